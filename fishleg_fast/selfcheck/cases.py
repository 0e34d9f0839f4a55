"""The blocks that ops are checked on, what is compared of them, and when it is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.matrix import dense
from ..algebra.structures.kron import Kron
from ..backends.arithmetic import own_arithmetic
from ..backends.protocol import LambdaOptions, Ops, ThetaOptions
from ..model.assemble import StructureChoice, build_blocks
from ..model.block import Block
from ..model.gradients import GradientInPlace
from .spectrum import two_levels

# precision -> the largest relative error that is right. TF32 cuts operands at 2⁻¹⁰, bfloat16 rounds them to 2⁻⁹; a θ
# step is two products with products, a λ gradient three or four of them.
LIMITS = {"highest": 1e-4, "tf32x3": 1e-4, "high": 1e-2, "medium": 4e-2}
# The same of polar factors, 18 products one after the other, of matrices that amplify rounding 150 times or so. With
# operands rounded as TF32's and bfloat16's are the reference itself was off by 0.024 and 0.091.
SPECTRAL_LIMITS = {"highest": 3e-4, "tf32x3": 3e-4, "high": 0.1, "medium": 0.2}
EPS = 1000.0  # Adam's, and its lr: a change of λ is then about proportional to its gradient, not to the gradient's sign
DAMPING = 0.1
# family -> its θ steps by their normalize; the first has no momentum yet
RULES: dict[str, tuple[str | None, ...]] = {
    "theta_step": ("rms", "rms", None, "trust"),
    "spectral": ("spectral",),
}


class OddShapes(nn.Module):
    """Layers whose blocks have odd sizes, no bias, a bias, one entry, a convolution's, and no matrix at all."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        k = scale
        self.layers = nn.ModuleList(
            [
                nn.Linear(8 * k - 1, 32 * k + 1),  # at scale 8: (257, 64)
                nn.Linear(1, 1, bias=False),
                nn.Linear(8 * k, 12 * k, bias=False),
                nn.Linear(98 * k, 125 * k),  # (1000, 785)
                nn.Conv2d(3, 2 * k, 3),
                nn.LayerNorm(8 * k + 1),
                nn.Embedding(5 * k, 2 * k),
                nn.Linear(3 * k, 7 * k),
            ]
        )


MIXED: Mapping[str, StructureChoice] = {
    "layers.0": partial(Kron, scale=True), "layers.2": "sumkron", "layers.7": "diagkron",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Layers, of which nothing but the parameters counts, and the structures of their blocks."""

    model: Callable[[], nn.Module]
    structure: StructureChoice | Mapping[str, StructureChoice] = "kron"


def _layers(count: int, n: int, m: int) -> nn.Module:
    return nn.ModuleList([nn.Linear(n, m) for _ in range(count)])


# A small odd shape; a list of blocks of every kind; enough large tiles (128×128) for every processor to get one.
FULL = {
    "odd": Case(partial(nn.Linear, 61, 33)),
    "grouped": Case(partial(OddShapes, 8), MIXED),
    "large": Case(partial(_layers, 6, 768, 513)),
}
MODEST = {  # for a CPU
    "odd": FULL["odd"],
    "grouped": Case(partial(OddShapes, 4), MIXED),
    "large": Case(partial(_layers, 1, 384, 257)),
}
TINY = {
    "odd": Case(partial(nn.Linear, 6, 4)),
    "grouped": Case(partial(OddShapes, 1), MIXED),
    "large": Case(partial(_layers, 2, 40, 33)),
}
SCALES = {"full": FULL, "modest": MODEST, "tiny": TINY, "least": {"odd": TINY["odd"]}}


class Draws:
    """Gaussian numbers on a device, in float32, that are the same again after ``restart``: drawn once, on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._drawn: list[Tensor] = []
        self._flat: dict[tuple[int, ...], Tensor] = {}
        self._next = 0
        self._generator = torch.Generator("cpu").manual_seed(1)

    def restart(self) -> None:
        self._next = 0

    def __call__(self, like: Tensor) -> Tensor:
        """The next ones: such as float32, bfloat16 and (but for the tiny ones) float16 hold alike."""
        if self._next == len(self._drawn):
            drawn = torch.randn(like.shape, generator=self._generator, dtype=torch.float32, device="cpu")
            drawn = torch.ones_like(drawn) if drawn.numel() == 1 else drawn  # near zero it would be all rounding
            self._drawn.append(drawn.to(torch.bfloat16).to(self.device, torch.float32))
        self._next += 1
        return self._drawn[self._next - 1]

    def two_levels(self, shape: tuple[int, int]) -> Tensor:
        """As ``spectrum.two_levels``, such as bfloat16 holds."""
        if shape not in self._flat:
            self._flat[shape] = two_levels(*shape).to(torch.bfloat16).to(self.device, torch.float32)
        return self._flat[shape]


@torch.no_grad()
def blocks_of(case: Case, draws: Draws, dtype: torch.dtype, on_device: bool = False) -> list[Block]:
    """Blocks with parameters of ``dtype``, gradients and λ near the identity: the same numbers whatever the dtype.

    ``on_device``: their step counters too.
    """
    draws.restart()
    with torch.device("meta"):
        model = case.model()
    model = model.to_empty(device=draws.device).to(dtype)
    blocks = build_blocks(model, list(model.parameters()), case.structure, "auto")
    for p in model.parameters():
        p.copy_(draws(p) * 0.0625)
        p.grad = draws(p).to(dtype, copy=True)
    options = {"lr": 1.0, "base_lr": 1.0, "beta": 0.9, "weight_decay": 0.1, "maximize": False}
    for block in blocks:
        block.allocate(on_device)
        block.structure.start_sgd(1.0)
        for t in block.structure.fishleg_aux.values():
            t.add_(draws(t), alpha=0.25 * max(t.shape[-1], 1) ** -0.5)
        block.groups = [options for _ in block.parts]
        block.grads = [part.of(p.grad) for part, p in zip(block.parts, block.params, strict=True) if p.grad is not None]
    return blocks


def vectors(blocks: Sequence[Block], draws: Draws) -> list[Tensor]:
    """Entries of order one: were they smaller, a change of a diagonal λ would drown in λ's own rounding."""
    return [draws(b.momentum).to(b.dtype, copy=True) for b in blocks]


@torch.no_grad()
def exercise(
    case: Case, draws: Draws, dtype: torch.dtype, ops: Ops, precision: str, families: Sequence[str]
) -> dict[str, list[Tensor]]:
    """What the ops make of a case's blocks, by family: P and S, Q u, inner products, changes of λ and of θ.

    Each family's is the same whichever others are asked for.
    """
    found: dict[str, list[Tensor]] = {}
    blocks = blocks_of(case, draws, dtype)
    us = vectors(blocks, draws)
    fvs = [u + 0.5 * x for u, x in zip(us, vectors(blocks, draws), strict=True)]  # of positive curvature, as F v is
    with own_arithmetic(blocks, precision):
        if "refresh" in families:
            ops.refresh(blocks)
            found["refresh"] = [t.clone() for b in blocks for t in b.structure.cache.values()]
        if "qv" in families:
            found["qv"] = [dense(v).clone() for v in ops.qv(blocks, us)]
        if "inner" in families:
            grads = [g for b in blocks for g in b.grads if g is not None]
            found["inner"] = [ops.inner(us, fvs).clone(), ops.inner(grads, grads).clone()]
        if "lambda_step" in families:
            vs = ops.qv(blocks, us)
            found["lambda_step"] = [
                change for learn_scale in (True, False) for change in _learned(blocks, ops, us, vs, fvs, learn_scale)
            ]
        steps = {family: rules for family, rules in RULES.items() if family in families}
        if steps:  # with P and S of another λ
            for t in (t for b in blocks for t in b.structure.fishleg_aux.values()):
                t.add_(t.flip(0).roll(1, -1), alpha=0.1 * max(t.shape[-1], 1) ** -0.5)
            ops.refresh(blocks)
        if "theta_step" in steps:
            found["theta_step"] = _moved(blocks, ops, steps["theta_step"])
        if "spectral" in steps:
            _with_two_levels(blocks, draws)
            ops.refresh(blocks)
            found["spectral"] = _moved(blocks, ops, steps["spectral"])
    return found


def _with_two_levels(blocks: Sequence[Block], draws: Draws) -> None:
    """Gradients of two singular values, and Q = I."""
    for block in blocks:
        block.structure.start_sgd(1.0)
        pieces = block.split(draws.two_levels(block.shape).to(block.dtype))
        block.grads = [None if g is None else x.to(g.dtype) for g, x in zip(block.grads, pieces, strict=True)]


def _learned(
    blocks: Sequence[Block], ops: Ops, us: list[Tensor], vs: Any, fvs: list[Tensor], learn_scale: bool
) -> list[Tensor]:
    """How a λ step changes λ, which is then as before."""
    aux = [t for b in blocks for t in b.structure.fishleg_aux.values()]
    before = [t.clone() for t in aux]
    ops.lambda_step(blocks, us, vs, fvs, LambdaOptions(damping=DAMPING, lr=EPS, eps=EPS, learn_scale=learn_scale))
    changes = [t - old for t, old in zip(aux, before, strict=True)]
    for t, old in zip(aux, before, strict=True):
        t.copy_(old)
    return changes


def _moved(blocks: Sequence[Block], ops: Ops, rules: Sequence[str | None]) -> list[Tensor]:
    """How θ steps from no momentum change θ, in float64, each by other gradients than the one before; of a block's
    parts together, as a bias of a few numbers may hardly move.
    """
    thetas = [[part.of(part.param) for part in b.parts] for b in blocks]
    grads = [b.grads for b in blocks]
    kappa = 0.05 * sum(t.numel() for parts in thetas for t in parts)  # about as large a step as the others
    for block in blocks:
        block.momentum.zero_()
        block.step.zero_()
    changes = []
    for rule in rules:
        before = [[t.clone() for t in parts] for parts in thetas]
        options = ThetaOptions(nesterov=True, normalize=rule, kappa=kappa)
        ops.theta_step(blocks, [GradientInPlace(b) for b in blocks], options)
        for parts, old in zip(thetas, before, strict=True):
            changes.append(torch.cat([(t.double() - o.double()).flatten() for t, o in zip(parts, old, strict=True)]))
            for t, o in zip(parts, old, strict=True):
                t.copy_(o)
        for block in blocks:
            block.grads = [None if g is None else g.flip(0).mul_(0.5) for g in block.grads]
    for block, mine in zip(blocks, grads, strict=True):
        block.grads = mine
    return changes


def relative(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest ‖got − want‖/‖want‖ of any tensor; infinite where something is not finite or not there."""
    if len(got) != len(want) or any(a.shape != b.shape for a, b in zip(got, want, strict=False)):
        return math.inf
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        b = b.double()
        error = float((a.double() - b).norm() / b.norm().clamp_min(torch.finfo(torch.float64).tiny))
        worst = max(worst, error) if error == error else math.inf
    return worst


def limit(family: str, precision: str, dtype: torch.dtype) -> float:
    """The largest relative error of a family that is right, with parameters of ``dtype``."""
    if family == "inner":  # sums of float32, whatever products are in
        return LIMITS["highest"]
    least = (SPECTRAL_LIMITS if family == "spectral" else LIMITS)[precision]
    moves = family in ("theta_step", "spectral")
    return max(least, 4 * torch.finfo(dtype).eps) if moves else least  # θ is rounded to its dtype
