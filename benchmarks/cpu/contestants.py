"""The contestants of a comparison of step times, each with a model of its own, run cycle by cycle in turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.common.published import Published
from benchmarks.cpu.summary import Rounds
from fishleg_fast import BernoulliLikelihood, FishLeg

UPDATE_EVERY = 10  # steps from λ update to λ update
WARM_UP = 2  # rounds that do not count: first allocations, and FishLeg's start of Q


class Stopwatch:
    """Seconds spent inside methods, which it wraps on one object each."""

    def __init__(self) -> None:
        self.seconds = {"aux": 0.0, "anchor": 0.0}

    def watch(self, owner: Any, method: str, share: str) -> None:
        """Count the time of `owner.method` as `share`."""
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[share] += time.perf_counter() - start

        setattr(owner, method, timed)


@dataclass
class Runner:
    """A contestant at work: `step(inputs)` is everything after backward()."""

    optimizer: Any
    step: Callable[[Tensor], Any]
    anchor_every: int = 0


def adamw(model: nn.Module, likelihood: Any, clock: Stopwatch) -> Runner:
    """torch's AdamW, fused."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return Runner(optimizer, lambda inputs: optimizer.step())


def fishleg(**settings: Any) -> Callable[[nn.Module, Any, Stopwatch], Runner]:
    """FishLeg with its defaults but for the settings named."""

    def make(model: nn.Module, likelihood: Any, clock: Stopwatch) -> Runner:
        optimizer = FishLeg(model, likelihood=likelihood, lr=1e-3, update_aux_every=UPDATE_EVERY, **settings)
        clock.watch(optimizer, "_anchor", "anchor")
        clock.watch(optimizer._learner, "update", "aux")
        return Runner(optimizer, lambda inputs: optimizer.step(), optimizer.settings.anchor_every)

    return make


def published(model: nn.Module, likelihood: Any, clock: Stopwatch) -> Runner:
    """The eager per-layer way. lr is tiny, since only time counts and nothing should leave the range of floats."""
    optimizer = Published(model, likelihood, lr=1e-6, update_aux_every=UPDATE_EVERY)
    clock.watch(optimizer, "aux_update", "aux")
    return Runner(optimizer, optimizer.step)


CONTESTANTS: dict[str, tuple[str, Callable[[nn.Module, Any, Stopwatch], Runner]]] = {
    "adamw": ("AdamW, fused", adamw),
    "fishleg-medium": ('FishLeg, precision="medium"', fishleg(precision="medium")),
    "fishleg": ('FishLeg, precision="highest"', fishleg(precision="highest")),
    "fishleg-dense": (
        'FishLeg, "highest", thin_gradients=False',
        fishleg(precision="highest", thin_gradients=False),
    ),
    "published": ("published, eager per layer", published),
}
if "thin_gradients" not in signature(FishLeg).parameters:
    del CONTESTANTS["fishleg-dense"]  # an older FishLeg: all of it is dense


class TimedTraining:
    """A contestant with a model of its own; cycle by cycle. Models and data, uniform noise, are the same for all."""

    def __init__(self, name: str, make_model: Callable[[], nn.Module], width: int, batch: int) -> None:
        torch.manual_seed(0)
        self.name = name
        self.batches = [torch.rand(batch, width) for _ in range(UPDATE_EVERY)]
        self.model, self.likelihood, self.clock = make_model().train(), BernoulliLikelihood(), Stopwatch()
        self.runner = CONTESTANTS[name][1](self.model, self.likelihood, self.clock)

    def cycle(self, steps: int) -> dict[str, float]:
        """So many training steps; the FIGURES, in ms. Those that the contestant lacks are nan."""
        passes, optimizing = [], []
        before = dict(self.clock.seconds)
        for i in range(steps):
            inputs = self.batches[i % len(self.batches)]
            start = time.perf_counter()
            self.runner.optimizer.zero_grad()
            loss = self.likelihood.nll(inputs, self.model(inputs))
            loss.backward()
            middle = time.perf_counter()
            self.runner.step(inputs)
            optimizing.append(time.perf_counter() - middle)
            passes.append(middle - start)
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"{self.name}: the loss is not finite, so that its times mean nothing")
        aux, anchor = (self.clock.seconds[share] - before[share] for share in ("aux", "anchor"))
        every = self.runner.anchor_every
        changing = [i % UPDATE_EVERY == 0 for i in range(steps)]
        ordinary = [t for i, t in enumerate(optimizing) if not changing[i] and (not every or i % every)]
        return {
            name: 1000 * seconds
            for name, seconds in {
                "whole": mean(passes) + mean(optimizing),
                "passes": mean(passes),
                "step": mean(optimizing),
                "theta": (sum(optimizing) - aux - anchor) / steps,
                "ordinary": median(ordinary),
                "changing": mean(t for t, c in zip(optimizing, changing, strict=True) if c) if aux else math.nan,
                "aux": aux / sum(changing) if aux else math.nan,
                "anchor": anchor / (steps // every) if every else math.nan,
                "anchor step": anchor / steps if every else math.nan,
            }.items()
        }

    def finish(self) -> None:
        """RuntimeError if steps were skipped: those cost less than they should."""
        if isinstance(self.runner.optimizer, FishLeg):
            counts = self.runner.optimizer.diagnostics()
            if counts["skipped_steps"] or counts["skipped_aux_steps"]:
                raise RuntimeError(f"{self.name} skipped steps, so that its times mean nothing")


def measure(trainings: Sequence[TimedTraining], rounds: int, title: str) -> tuple[list[Rounds], int]:
    """Each training's rounds that count, and the steps of a cycle."""
    steps = math.lcm(UPDATE_EVERY, *(training.runner.anchor_every or 1 for training in trainings))
    found: list[Rounds] = [[] for _ in trainings]
    for number in tqdm(range(WARM_UP + rounds), desc=title):
        for i in range(len(trainings)):
            turn = (number + i) % len(trainings)  # who goes first changes, and with it what the caches hold
            figures = trainings[turn].cycle(steps)
            if number >= WARM_UP:
                found[turn].append(figures)
    for training in trainings:
        training.finish()
    return found, steps
