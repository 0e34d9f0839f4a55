"""Training, the same for every model and optimizer: a problem, a loop with a progress bar, a run's record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.common.optimizers import OPTIMIZERS
from benchmarks.train.datasets import Dataset, pixels


@dataclass(frozen=True)
class Problem:
    """A data set, a model and a likelihood. `likelihood.nll(targets, outputs)` is what is minimised.

    `prepare` maps stored images to the model's inputs; without labels it is an autoencoder: its targets
    are its inputs. `metrics` names further figures: (targets, outputs) -> one value per example. Evaluations
    are of the whole split, or of `evaluated` examples spread evenly over it, `evaluation_batch` at a time.
    """

    data: Dataset
    make_model: Callable[[], nn.Module]
    likelihood: Any
    prepare: Callable[[Tensor], Tensor] = pixels
    labelled: bool = False
    metrics: dict[str, Callable[[Tensor, Tensor], Tensor]] = field(default_factory=dict)
    device: str = "cpu"
    evaluated: int | None = None
    evaluation_batch: int = 1000

    def batch(self, index: Tensor, split: str = "train") -> tuple[Tensor, Tensor]:
        """Inputs and targets of the examples named."""
        images, labels = getattr(self.data, split), getattr(self.data, f"{split}_labels")
        inputs = self.prepare(images[index].to(self.device))
        return inputs, labels[index].to(self.device) if self.labelled else inputs

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Means over a split, in eval mode; keys such as "train nll"."""
        was_training = model.training
        model.eval()
        size = len(getattr(self.data, split))
        count = min(size, self.evaluated or size)
        sums = dict.fromkeys(["nll", *self.metrics], 0.0)
        for index in (torch.arange(count) * size // count).split(self.evaluation_batch):
            inputs, targets = self.batch(index, split)
            outputs = model(inputs)
            sums["nll"] += float(self.likelihood.nll(targets, outputs)) * len(index)
            for name, metric in self.metrics.items():
                sums[name] += float(metric(targets, outputs).sum())
        model.train(was_training)
        return {f"{split} {name}": value / count for name, value in sums.items()}


def squared_error(targets: Tensor, logits: Tensor) -> Tensor:
    """Squared error of an image's reconstruction, summed over its pixels: (n, d), (n, d) -> (n,)."""
    return (targets - logits.sigmoid()).square().sum(1)


def accuracy(targets: Tensor, logits: Tensor) -> Tensor:
    """1 where the largest logit is the label's: (n,), (n, classes) -> (n,)."""
    return (logits.argmax(1) == targets).float()


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of indices; each pass over the data is shuffled anew, and drops an incomplete batch."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % size].split(size)


@dataclass
class Run:
    """What training leaves behind, whole or interrupted."""

    optimizer: str
    label: str
    lr: float
    batch: int
    seed: int
    losses: list[float]  # of each step's batch
    times: list[float]  # wall seconds from the start to the end of each step
    cpu_seconds: float
    figures: dict[str, float]  # the problem's metrics
    settings: dict[str, Any]
    model: nn.Module
    interrupted: bool = False


def training_step(
    problem: Problem, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], index: Tensor
) -> Tensor:
    """One step on the examples named; their loss before it."""
    inputs, targets = problem.batch(index)
    for o in optimizers:
        o.zero_grad()
    loss = problem.likelihood.nll(targets, model(inputs))
    loss.backward()
    for o in optimizers:
        o.step()
    return loss


def settings_of(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """All settings of the optimizers, by class and name."""
    found = {}
    for o in optimizers:
        settings = getattr(o, "settings", None)
        own = {} if settings is None else {f.name: getattr(settings, f.name) for f in fields(settings)}
        found |= {f"{type(o).__name__}.{name}": value for name, value in {**o.defaults, **own}.items()}
    return found


def schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Half a cosine, after a linear rise over `warmup` steps if there are any."""
    if not warmup:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(steps - warmup, 1))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train(
    problem: Problem,
    optimizer: str,
    lr: float,
    steps: int,
    batch: int,
    seed: int = 0,
    progress: bool = True,
    every: Callable[[float, nn.Module], None] | None = None,
    warmup: int = 0,
) -> Run:
    """Train a new model by the named row of OPTIMIZERS, lr falling from `lr` to 0 along half a cosine.

    Before that it rises for `warmup` steps.

    `seed` decides the initial parameters and the order of the data. Ctrl-C ends the run early, with what was
    reached. A loss that is not finite ends it too: nothing later could repair the parameters. `every` is called
    after each step with the seconds so far and the model; the clocks stand still meanwhile.
    """
    torch.manual_seed(seed)
    model = problem.make_model().to(problem.device).train()
    choice = OPTIMIZERS[optimizer]
    stream = batches(len(problem.data.train), batch, seed)
    losses: list[float] = []
    times: list[float] = []
    interrupted = False
    start, cpu_start = time.perf_counter(), time.process_time()
    optimizers = choice.make(model, problem.likelihood, lr)
    schedules = [schedule(o, steps, warmup) for o in optimizers]
    bar = tqdm(total=steps, desc=f"{choice.label} lr {lr:g}", disable=not progress, mininterval=0.5)
    try:
        for _ in range(steps):
            loss = training_step(problem, model, optimizers, next(stream))
            for s in schedules:
                s.step()
            losses.append(loss.item())
            times.append(time.perf_counter() - start)
            bar.update()
            bar.set_postfix(nll=f"{losses[-1]:.2f}", refresh=False)
            if every is not None:
                paused, cpu_paused = time.perf_counter(), time.process_time()
                every(times[-1], model)
                start += time.perf_counter() - paused
                cpu_start += time.process_time() - cpu_paused
            if not math.isfinite(losses[-1]):
                break
    except KeyboardInterrupt:
        interrupted = True
    cpu_seconds = time.process_time() - cpu_start
    bar.close()
    figures = {**problem.evaluate(model, "train"), **problem.evaluate(model, "test")}
    return Run(
        optimizer, choice.label, lr, batch, seed, losses, times, cpu_seconds, figures, settings_of(optimizers),
        model, interrupted,
    )  # fmt: skip
