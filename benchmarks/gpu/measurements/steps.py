"""Times of optimizer steps on whole models: FishLeg of each backend, fused AdamW, and the published per-layer way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import mean, median
from typing import Any

import torch
from torch import nn

from benchmarks.common.published import Published
from benchmarks.gpu.clock import Clock, Times, spread
from benchmarks.gpu.measurements.models import Case
from benchmarks.gpu.measurements.ops import LR, filled, isolated
from fishleg_fast import FishLeg
from fishleg_fast.likelihoods import Likelihood
from fishleg_fast.precision import precision_scope

EVERY = 10  # steps from λ update to λ update, and from anchoring to anchoring: a cycle
MOST_CYCLES = 20


def adamw(model: nn.Module, capturable: bool = False) -> torch.optim.AdamW:
    """torch's AdamW, fused."""
    return torch.optim.AdamW(model.parameters(), lr=LR, fused=True, capturable=capturable)


def _model(case: Case, device: torch.device) -> tuple[nn.Module, Likelihood]:
    torch.manual_seed(0)
    return case.make_model().to(device).train(), case.make_likelihood().to(device)


def _backward(case: Case, model: nn.Module, likelihood: Likelihood, device: torch.device) -> None:
    inputs, targets = case.batch(device)
    likelihood.nll(targets, model(inputs)).backward()


def _theta(case: Case, device: torch.device, name: str, precision: str, capturable: bool) -> Callable[[], Any]:
    """A θ step with a gradient that stays: no λ update, no anchoring, P and S cached where there are such."""
    model, likelihood = _model(case, device)
    if name == "adamw":
        opt: Any = adamw(model, capturable and device.type == "cuda")
        _backward(case, model, likelihood, device)
        return opt.step
    if name == "published":
        theirs = Published(model, likelihood, lr=LR)
        with torch.no_grad():
            for layer in theirs.layers:
                for t in (layer.R, layer.L):
                    t.add_(torch.randn_like(t), alpha=0.3 * t.shape[0] ** -0.5)
        _backward(case, model, likelihood, device)
        return theirs.theta_step
    settings = dict(backend=name, precision=precision, capturable=capturable)
    ours = FishLeg(model, likelihood=likelihood, **isolated(settings))
    _backward(case, model, likelihood, device)
    return filled(ours).step


def theta_task(clock: Clock, case: Case, name: str, precision: str) -> Times:
    """Times of the θ step alone, eagerly and as a CUDA graph, and its launches."""
    scope = precision_scope(precision) if name == "published" else nullcontext()  # FishLeg has its own
    with scope:
        fn = _theta(case, clock.device, name, precision, False)
        if name == "published":
            captured = fn
        else:  # the reference makes tensors of host numbers, which no graph captures
            captured = None if name == "reference" else _theta(case, clock.device, name, precision, True)
        return clock.both(fn, captured) | clock.launches(fn)


class Shares:
    """The device's time inside methods, which it wraps on one object each."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.marks: dict[str, list[tuple[Any, Any]]] = {"aux": [], "anchor": []}

    def watch(self, owner: Any, method: str, share: str) -> None:
        """Count the time of `owner.method` as `share`."""
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.clock.mark()
            result = inner(*args, **kwargs)
            self.marks[share].append((start, self.clock.mark()))
            return result

        setattr(owner, method, timed)

    def take(self, share: str) -> list[float]:
        """ms of each call so far; forgets them."""
        found = [self.clock.between(a, b) for a, b in self.marks[share]]
        self.marks[share] = []
        return found


class Training:
    """Whole training steps of one contestant, a cycle at a time."""

    def __init__(self, clock: Clock, case: Case, name: str, precision: str) -> None:
        self.clock, self.name, self.precision = clock, name, precision
        self.model, self.likelihood = _model(case, clock.device)
        self.batches = [case.batch(clock.device) for _ in range(EVERY)]
        self.shares = Shares(clock)
        if name == "adamw":
            self.opt: Any = adamw(self.model)
        elif name == "published":
            self.opt = Published(self.model, self.likelihood, lr=LR, update_aux_every=EVERY)
            self.shares.watch(self.opt, "aux_update", "aux")
        else:
            self.opt = FishLeg(
                self.model, likelihood=self.likelihood, lr=LR, update_aux_every=EVERY, anchor_every=EVERY,
                backend=name, precision=precision,
            )  # fmt: skip
            self.shares.watch(self.opt, "_anchor", "anchor")
            self.shares.watch(self.opt._learner, "update", "aux")

    def _step(self, inputs: torch.Tensor) -> None:
        if self.name != "published":
            self.opt.step()
            return
        with precision_scope(self.precision):
            self.opt.step(inputs)

    def cycle(self) -> dict[str, float]:
        """ms: of a whole step and its shares, amortised; of an ordinary θ step; of a λ update and an anchoring."""
        clock, marks = self.clock, []
        for inputs, targets in self.batches:
            first = clock.mark()
            self.opt.zero_grad()
            loss = self.likelihood.nll(targets, self.model(inputs))
            loss.backward()
            middle = clock.mark()
            self._step(inputs)
            marks.append((first, middle, clock.mark()))
        clock.wait()
        if not math.isfinite(loss.item()):
            raise RuntimeError("the loss is not finite, so that the times mean nothing")
        passes = [clock.between(a, b) for a, b, _ in marks]
        steps = [clock.between(b, c) for _, b, c in marks]
        aux, anchor = self.shares.take("aux"), self.shares.take("anchor")
        figures = {
            "whole": mean(passes) + mean(steps),
            "passes": mean(passes),
            "step": mean(steps),
            "ordinary": median(steps[1:]),  # λ changes at the first step of a cycle
        }
        if aux:
            figures["aux"] = mean(aux)
        if anchor:
            figures["anchor"] = max(anchor)  # it is called at every step, and anchors at one
        return figures

    def finish(self) -> None:
        """RuntimeError if steps were skipped: those cost less than they should."""
        if isinstance(self.opt, FishLeg):
            counts = self.opt.diagnostics()
            if counts["skipped_steps"] or counts["skipped_aux_steps"]:
                raise RuntimeError(f"steps were skipped, so that the times mean nothing: {counts}")


def train_task(clock: Clock, case: Case, name: str, precision: str, seconds: float) -> Times:
    """A training step and its shares: medians over cycles, after two that do not count. No seconds: one cycle."""
    training = Training(clock, case, name, precision)
    training.cycle()
    start = time.perf_counter()
    training.cycle()
    each = max(time.perf_counter() - start, 1e-6)
    cycles = [training.cycle() for _ in range(int(max(3 if seconds else 1, min(MOST_CYCLES, seconds / each))))]
    training.finish()
    return {name: spread([c[name] for c in cycles]) for name in cycles[0]} | {"cycle": EVERY}
