"""Is it right? Every backend's ops on the device against the reference in float64, by structure and precision."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.measurements.ops import DAMPING
from fishleg_fast import FishLeg, GaussianLikelihood
from fishleg_fast.algebra.structures.kron import Kron
from fishleg_fast.backends import reference
from fishleg_fast.backends.arithmetic import own_arithmetic
from fishleg_fast.backends.protocol import LambdaOptions, Ops, ThetaOptions
from fishleg_fast.model.block import Block

# precision -> the largest relative error that is right. TF32 cuts operands at 2⁻¹⁰, bfloat16 rounds them to 2⁻⁹; a θ
# step is two products with products, a λ gradient three or four of them.
LIMITS = {"highest": 1e-4, "tf32x3": 1e-4, "high": 1e-2, "medium": 4e-2}
EPS = 1000.0  # Adam's, and its lr
STRUCTURES: dict[str, Any] = {
    "kron": "kron",
    "kron-scaled": partial(Kron, scale=True),
    "diagkron": "diagkron",
    "sumkron": "sumkron",
    "diagonal": "diagonal",
}
QUANTITIES = ("refresh", "qv", "lambda", "theta")


class OddShapes(nn.Module):
    """Layers whose blocks have odd sizes, no bias, a bias, one entry, a convolution's, and no matrix at all."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        k = scale
        self.layers = nn.ModuleList(
            [
                nn.Linear(8 * k - 1, 32 * k + 1),  # at scale 8: (257, 64)
                nn.Linear(1, 1, bias=False),
                nn.Linear(8 * k, 8 * k, bias=False),
                nn.Linear(98 * k, 125 * k),  # (1000, 785)
                nn.Conv2d(3, 2 * k, 3),
                nn.LayerNorm(8 * k + 1),
                nn.Embedding(5 * k, 2 * k),
            ]
        )


def optimizer(scale: int, device: torch.device, dtype: torch.dtype, **settings: Any) -> FishLeg:
    """FishLeg on ``OddShapes``: parameters, gradients and λ drawn in float64 by one seed, whatever the dtype."""
    generator = torch.Generator().manual_seed(1)
    rand = lambda t: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)
    model = OddShapes(scale).to(device, dtype)
    opt = FishLeg(
        model, likelihood=GaussianLikelihood(), lr=1.0, weight_decay=0.01, init="sgd", thin_gradients=False, **settings
    )
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(rand(p))
            p.grad = rand(p)
        for block in opt.blocks:
            for t in block.structure.fishleg_aux.values():
                t.add_(rand(t) * 0.3 * max(t.shape[-1], 1) ** -0.5)
    return opt


def _vectors(blocks: list[Block], seed: int) -> list[Tensor]:
    """Entries of order one: were they smaller, a change of a diagonal λ would drown in λ's own rounding."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(b.shape, generator=generator, dtype=torch.float64) for b in blocks]
    return [x.to(b.momentum.device, b.dtype) for b, x in zip(blocks, draws, strict=True)]


@torch.no_grad()
def run(opt: FishLeg, ops: Ops) -> dict[str, list[Tensor]]:
    """What the ops make of it: P and S, Q u, the change of λ, and that of θ by two steps with a new λ.

    Adam's eps is large, so that a change of λ is about proportional to its gradient and not to the gradient's sign.
    """
    with own_arithmetic(opt.blocks, opt.settings.precision):
        blocks, _ = opt._gather()
        us = _vectors(blocks, 2)
        fvs = [u + 0.5 * x for u, x in zip(us, _vectors(blocks, 3), strict=True)]  # of positive curvature, as F v is
        ops.refresh(blocks)
        found = {"refresh": [t.clone() for b in blocks for t in b.structure.cache.values()]}
        vs = ops.qv(blocks, us)
        found["qv"] = [v.clone() for v in vs]
        before = [t.clone() for b in blocks for t in b.structure.fishleg_aux.values()]
        ops.lambda_step(blocks, us, vs, fvs, LambdaOptions(damping=DAMPING, lr=EPS, eps=EPS, learn_scale=False))
        aux = [t for b in blocks for t in b.structure.fishleg_aux.values()]
        found["lambda"] = [t - old for t, old in zip(aux, before, strict=True)]
        for t, old, change in zip(aux, before, found["lambda"], strict=True):  # change it less: by 0.3 of its norm
            t.copy_(old).add_(change * (0.3 * old.norm() / change.norm().clamp_min(1e-30)))
        ops.refresh(blocks)
        thetas = [part.param.detach().clone() for b in blocks for part in b.parts]
        for _ in range(2):
            blocks, gs = opt._gather()
            ops.theta_step(blocks, gs, ThetaOptions(nesterov=True))
            for block in blocks:  # else every average would be the gradient itself
                for g in block.grads:
                    g.copy_(g.flip(0)).mul_(-0.5)
        moved = [part.param.detach() for b in blocks for part in b.parts]
        found["theta"] = [b - a for a, b in zip(thetas, moved, strict=True)]
    return found


def relative(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest ‖got − want‖/‖want‖ of any tensor; infinite where something is not finite or not there."""
    if len(got) != len(want) or any(a.shape != b.shape for a, b in zip(got, want, strict=False)):
        return float("inf")
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        b = b.double()
        error = float((a.double() - b).norm() / b.norm().clamp_min(torch.finfo(torch.float64).tiny))
        worst = max(worst, error) if error == error else float("inf")
    return worst


def check_task(device: torch.device, backend: str, precision: str, structure: str, scale: int) -> dict[str, Any]:
    """Relative errors of one backend, and whether all are within the precision's limit."""
    make = partial(optimizer, scale, device, structure=STRUCTURES[structure])
    ours = make(torch.float32, backend=backend, precision=precision)
    truth = make(torch.float64, backend="reference", precision="highest")
    got, want = run(ours, ours._ops), run(truth, reference)
    # A cache that a backend does not fill is not an error of its products.
    errors = {q: relative(got[q], want[q]) for q in QUANTITIES if want[q]}
    limit = LIMITS[precision]
    return {
        "errors": {q: e if e != float("inf") else None for q, e in errors.items()},
        "limit": limit,
        "right": all(e <= limit for e in errors.values()),
    }
