"""Shortening the steps that would go beyond the minimum of the loss's quadratic model along them.

Each block's Q knows nothing of the others', whose effects on the outputs add up: along a whole step Δ the curvature
ΔᵀFΔ may be many times what Q was made for. One forward pass that carries Δ tells it, and with the targets that were
trained on the slope too, in the same units: gᵀΔ + ½ΔᵀFΔ (Martens & Grosse 2015, section 6.4) has its minimum at
−gᵀΔ/ΔᵀFΔ steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..algebra.matrix import widest
from ..distributed.ranks import Ranks
from ..passes.inputs import EmptyBatch, Inputs
from ..passes.isolated import IsolatedPasses
from .products import forward_mode_product, ggn, gradients, of_model

REST = 10  # steps at most between two measurements
HOLD = 4  # where steps are near the limit
NEAR = 1 / 3  # of it
AGREE = 1.5  # times as long as it was foretold, at most, is as foretold
IN_A_ROW = 3  # of measurements as foretold, near the limit, make steps between two one more
POSITIONS = 256  # that are enough to measure a step by, where a sample has several

# (5,): −gᵀΔ; the mean square of each sample's part in that; ΔᵀFΔ; the number of samples; the parts' mean, without what
# is of the likelihood's own parameters
Line = Tensor
# Of this rank's part of a batch, and a seed that leaves those of drawn labels as they are.
Measure = Callable[[Inputs, int], Line]


class StepLimit:
    """Measures steps, and shortens those beyond ``limit`` times the quadratic model's minimum along them.

    A slope that is smaller than its own standard error counts as that. Steps between two measurements are taken for as
    long, in those of the limit, as the latest that was measured, times what lr has grown. Where that is what
    measurements find they come more rarely, down to every fourth step near the limit, and every tenth well within.
    Nothing is told, and no step shortened, where the targets are not known (``passes.taps.targets``).
    """

    def __init__(self, passes: IsolatedPasses, ranks: Ranks, limit: float, samples: int | str | None) -> None:
        self._passes, self._ranks, self._limit, self._samples = passes, ranks, limit, samples
        self._next, self._gap, self._streak = 0, 1, 0  # the latter: of measurements as foretold
        self._length, self._lr = 0.0, 0.0  # of the latest step whose measurement has been read
        self._unread: tuple[int, Tensor, float] | None = None  # a step that was measured, its length and lr
        self._scale: Tensor | float | None = None  # of the latest step
        self._shortened = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        self._read()
        return {
            "limit_next": self._next, "limit_gap": self._gap, "limit_streak": self._streak,
            "limit_length": self._length, "limit_lr": self._lr, "shortened_steps": self._shortened,
        }  # fmt: skip

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take up what ``state`` gave; checkpoints of before have less, or nothing."""
        self._unread = self._scale = None
        self._next, self._gap = saved.get("limit_next", 0), saved.get("limit_gap", 1)
        self._streak = saved.get("limit_streak", 0)
        self._length, self._lr = saved.get("limit_length", 0.0), saved.get("limit_lr", 0.0)
        self._shortened = saved.get("shortened_steps", 0)

    def report(self) -> dict[str, Any]:
        """shortened_steps: how many; step_scale: the factor of the latest step, None where no targets told it."""
        self._read()
        return {"shortened_steps": self._shortened, "step_scale": None if self._scale is None else float(self._scale)}

    def _foretold(self, lr: float) -> float:
        """The length of a step of this lr."""
        return self._length * (lr / self._lr if self._lr else 1.0)

    def _read(self) -> None:
        """When to measure next. Not at once, where the host would wait for the device."""
        if self._unread is None:
            return
        step, length, lr = self._unread[0], float(self._unread[1]), self._unread[2]
        ratio = max(length, NEAR) / max(self._foretold(lr), NEAR)
        foretold = self._lr > 0 and 1 / AGREE <= ratio <= AGREE
        self._streak = self._streak + 1 if foretold else 0
        if length > NEAR:
            self._gap = min(1 + self._streak // IN_A_ROW, HOLD)
        else:
            self._gap = min(2 * self._gap, REST) if foretold else 1
        self._next, self._length, self._lr, self._unread = step + self._gap, length, lr, None
        self._shortened += length > 1

    def _risen(self, lr: float) -> bool:
        """Whether lr is no longer near that of the latest measurement."""
        return lr > 2 * self._lr

    def look_ahead(self, step: int, lr: float) -> None:
        """See the targets of the next step, if that may be measured."""
        if self._unread is not None and self._unread[1].device.type == "cpu":
            self._read()
        if self._passes.targets is not None:
            self._passes.targets.open = self._unread is not None or step >= self._next or self._risen(lr)

    def scale(self, step: int, lr: float) -> Callable[[Measure], Tensor] | None:
        """What tells this step's factor, at most 1, a scalar, from its measurement; None: it is 1. On all ranks alike.

        ``lr``: the greatest of the parameter groups'.
        """
        self._read()
        due = step >= self._next
        if due or self._risen(lr):
            if self._ranks.agreed([self._passes.labelled()])[0]:
                return partial(self.factor, step, lr)
            if due:
                self._length, self._scale = 0.0, None
                return None
        self._scale = 1 / max(self._foretold(lr), 1.0)
        self._shortened += self._scale < 1
        held = torch.tensor(self._scale, dtype=torch.float64, device="cpu")
        return None if self._scale == 1 else lambda measured: held

    def factor(self, step: int, lr: float, measured: Measure) -> Tensor:
        """What to multiply this step by, of its measurement: a scalar, at most 1."""
        length = self._measure(step, measured)
        self._unread, self._scale = (step, length, lr), 1 / length.clamp_min(1)
        return self._scale

    def _measure(self, step: int, measured: Measure) -> Tensor:
        """How long a step is in those of the limit; zero where nobody knows."""
        unknown = torch.zeros((), device="cpu")
        try:
            found = self._ranks.each(lambda: measured(self._inputs(), step))
        except EmptyBatch:
            return unknown
        except Exception as failure:  # a step that has been taken should not end a training
            reason = (str(failure).strip() or type(failure).__name__).splitlines()[0][:200]
            self._passes.tell_once(
                "step_limit",
                f"a step could not be measured, and was left as lr says: {reason}. step_limit=None leaves all so",
            )
            return unknown
        count = found[3].clone() * self._ranks.size
        self._ranks.mean([found])
        slope, square, curvature, _, mean = found.unbind()
        error = ((square - mean.square()).clamp_min(0) / (count - 1).clamp_min(1)).sqrt()
        length = curvature / (self._limit * torch.maximum(slope, error))
        return torch.where((curvature > 0) & torch.isfinite(length), length, 0)

    def _inputs(self) -> Inputs:
        """A part of the batch; where classes are of positions, as in language models, no more samples than need be."""
        inputs = self._passes.inputs(self._samples)
        targets = inputs.targets
        if self._samples != "auto" or targets is None or targets.is_floating_point():
            return inputs
        return inputs.rows(0, max(1, POSITIONS * inputs.size() // max(targets.numel(), 1)))

    def around(
        self, factor: Callable[[Measure], Tensor], params: Sequence[Tensor], move: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """``move()``, which moves ``params``, and what it returns; that far only as ``factor`` has it."""
        before = [p.detach().clone() for p in params]
        found = move()

        def measured(inputs: Inputs, seed: int) -> Line:
            deltas = torch._foreach_sub([p.detach() for p in params], before)
            return line(self._passes, params, before, deltas, inputs, seed)

        scale = factor(measured)
        known = float(scale) if scale.device.type == "cpu" else None
        if known is None or known < 1:
            for p, start in zip(params, before, strict=True):
                p.copy_(torch.lerp(start, p.detach(), scale.to(p) if known is None else known))
        return found


def line(
    passes: IsolatedPasses,
    params: Sequence[Tensor],
    values: Sequence[Tensor],
    vs: Sequence[Tensor],
    inputs: Inputs,
    seed: int = 0,
) -> Line:
    """The quadratic model of the loss along v from the parameters' ``values`` on, on a batch whose targets are known:
    by one forward pass that carries v; where that fails by F v and a gradient.
    """
    attempts, mode = passes.attempts("ggn", "forward mode"), passes.mode()
    if passes.attempts("step_limit", "forward mode").check_due(mode):
        with _moved_to([*zip(params, values, strict=True)]):
            ggn(passes, params, vs, inputs, seed)  # which checks that forward mode tells the truth
    if attempts.due(mode):
        assert passes.likelihood is not None
        own = set(map(id, passes.likelihood.parameters()))
        noise = [(p, value) for p, value in zip(params, values, strict=True) if id(p) in own]
        try:
            with _moved_to(noise):
                found = passes.run(inputs, seed, partial(_carried, passes, params, values, vs, inputs), twice=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # which F v will meet too, and tell of
            pass
        else:
            attempts.worked()
            return found
    with _moved_to([*zip(params, values, strict=True)]):
        products = ggn(passes, params, vs, inputs, seed)
        slopes = passes.run(inputs, seed, lambda: gradients(passes.training_loss(inputs), list(params)))
    slope, curvature = -_dot(slopes, vs), _dot(products, vs)
    return torch.stack([slope, slope.square(), curvature, torch.ones_like(slope), slope])


@contextmanager
def _moved_to(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Parameters have other values inside."""
    there = [p.detach().clone() for p, _ in pairs]
    try:
        for p, value in pairs:
            p.detach().copy_(value)
        yield
    finally:
        for (p, _), value in zip(pairs, there, strict=True):
            p.detach().copy_(value)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """Elementwise, of float32 at least."""
    least = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return x.to(least) * y.to(least)


def _dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    wide = widest(xs[0].device)
    return torch.stack([_product(x, y).sum(dtype=wide) for x, y in zip(xs, ys, strict=True)]).sum()


def _carried(
    passes: IsolatedPasses,
    params: Sequence[Tensor],
    values: Sequence[Tensor],
    vs: Sequence[Tensor],
    inputs: Inputs,
) -> Line:
    """By a forward pass that carries v."""
    mine = of_model(passes, params, vs)
    known = {id(p): value for p, value in zip(params, values, strict=True)}
    then = partial(quadratic_model, passes, params, vs, inputs)
    return forward_mode_product(passes, mine, inputs, then, [known[id(p)] for p, _ in mine])


def quadratic_model(
    passes: IsolatedPasses,
    params: Sequence[Tensor],
    vs: Sequence[Tensor],
    inputs: Inputs,
    output: Tensor,
    tangent: Tensor | None,
) -> Line:
    """``line`` from the outputs and J v on; of ``params`` the likelihood's own count besides."""
    likelihood, scoring = passes.likelihood, passes.scoring(inputs)
    assert likelihood is not None
    own = {id(p): v for p, v in zip(params, vs, strict=True)}
    noise = [p for p in likelihood.parameters() if id(p) in own]
    wide = widest(output.device)
    leaf = output.detach().requires_grad_()
    pull, *pulls = gradients(scoring.nll(passes.training_targets(inputs), leaf), [leaf, *noise])
    tangent = torch.zeros_like(leaf) if tangent is None else tangent.detach().to(leaf.dtype)
    product = _product(pull, tangent)
    each = -product.reshape(len(product), -1).sum(1, dtype=wide) * len(product)
    curvature = _dot([tangent], [scoring.fisher_product(leaf.detach(), tangent)])
    turned = likelihood.own_fisher_product(leaf.detach(), [own[id(p)] for p in noise]) if noise else []
    slope = mean = each.mean()
    for p, g, f in zip(noise, pulls, turned, strict=True):
        slope, curvature = slope - _dot([g], [own[id(p)]]), curvature + _dot([f], [own[id(p)]])
    return torch.stack([slope, each.square().mean(), curvature, curvature.new_tensor(float(len(each))), mean]).detach()
