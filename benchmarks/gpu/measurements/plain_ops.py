"""The ops as plain functions of lists of tensors, for torch.compile: the opponent that a user could write down.

For `Kron` blocks. All operands of products are cast to P's dtype, which is bfloat16 where the kernels' are. Tests hold
these against the reference's ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Tensors = Sequence[Tensor]
BETA, AUX_BETAS, AUX_EPS, RMS = 0.9, (0.9, 0.999), 1e-7, 0.2


def qv(Ps: Tensors, us: Tensors, Ss: Tensors) -> list[Tensor]:
    """P u S."""
    return [(P @ u.to(P.dtype) @ S).to(u.dtype) for P, u, S in zip(Ps, us, Ss, strict=True)]


def refresh(Rs: Tensors, Ls: Tensors, Ps: Tensors, Ss: Tensors) -> None:
    """P = RᵀR and S = LLᵀ, in place."""
    for R, L, P, S in zip(Rs, Ls, Ps, Ss, strict=True):
        P.copy_(R.to(P.dtype).T @ R.to(P.dtype))
        S.copy_(L.to(S.dtype) @ L.to(S.dtype).T)


def theta_step(
    parts: Sequence[Tensors],  # of each block: the weight, and the bias if it has one
    grads: Sequence[Tensors],
    momenta: Tensors,  # (m, n)
    Ps: Tensors,
    Ss: Tensors,
    correction: Tensor,  # of Nesterov's average at this step, a scalar
    lr: float,
) -> None:
    """m̂ = β(βm + (1−β)g) + (1−β)g, θ ← θ − lr·0.2√(mn)·Q m̂/‖Q m̂‖, in place: FishLeg's defaults."""
    for params, gs, m, P, S in zip(parts, grads, momenta, Ps, Ss, strict=True):
        g = torch.cat([x.reshape(m.shape[0], -1) for x in gs], dim=1) if len(gs) > 1 else gs[0].reshape(m.shape)
        average = torch.lerp(m, g, 1 - BETA)
        nat = qv([P], [torch.lerp(average, g, 1 - BETA)], [S])[0] / correction
        norm = nat.norm()
        scaled = nat * torch.where(norm > 0, RMS * nat.numel() ** 0.5 / norm, 0)
        m.copy_(average)
        column = 0
        for p in params:
            count = p.numel() // m.shape[0]
            p.sub_(lr * scaled[:, column : column + count].reshape(p.shape))
            column += count


def lambda_step(
    Rs: Tensors,
    Ls: Tensors,
    Ps: Tensors,
    Ss: Tensors,
    moments: Sequence[Tensors],  # of each block: first and second moment of R, then of L
    us: Tensors,
    vs: Tensors,
    fvs: Tensors,
    step: Tensor,  # the steps so far, a scalar
    damping: float,
    lr: float,
) -> None:
    """One Adam step of λ at Q's best multiple, in place: FishLeg's defaults."""
    inner = lambda xs, ys: sum((x * y).sum() for x, y in zip(xs, ys, strict=True))
    curved = [fv + damping * v for v, fv in zip(vs, fvs, strict=True)]
    vFv = inner(vs, curved)
    scale = torch.where(vFv > 0, inner(us, vs) / vFv, 1)
    step.add_(1)
    b1, b2 = AUX_BETAS
    c1, c2 = 1 - b1**step, (1 - b2**step).sqrt()
    for R, L, P, S, (mR, vR, mL, vL), u, c in zip(Rs, Ls, Ps, Ss, moments, us, curved, strict=True):
        kind = P.dtype
        w = (scale * c - u).to(kind)
        u, r, l = u.to(kind), R.to(kind), L.to(kind)
        M, N = u.T @ (P @ w), (w @ S) @ u.T
        for x, m, v, grad in ((R, mR, vR, r @ (N + N.T)), (L, mL, vL, (M + M.T) @ l)):
            grad = grad.to(x.dtype)
            m.lerp_(grad, 1 - b1)
            v.lerp_(grad * grad, 1 - b2)
            x.sub_(lr * (m / c1) / (v.sqrt() / c2 + AUX_EPS))


def compiled(function: Any, mode: str | None, backend: str) -> Any:
    """torch.compile of one function for fixed shapes, forgetting earlier ones: those would count against its limit."""
    torch.compiler.reset()
    options = {"mode": mode} if backend == "inductor" else {"backend": backend}
    return torch.compile(function, dynamic=False, fullgraph=True, **options)
