"""Natural-gradient steps of λ: on the auxiliary loss averaged over u, for a Fisher matrix that is a Kronecker product.

With u drawn from N(0, Q⁻¹), as gradients are where Q is right, F = G ⊗ Ā and Q' = (R+E R)ᵀ(R+E R) ⊗ LLᵀ, the average of
𝒜 = ½ vᵀ(F+γI)v − uᵀv, v = Q'u, has at E = 0 the gradient 2n(Ĝ − I) in E, n the size of L, and the curvature 4n: with

    Ĝ = (tr(LᵀĀL)·R G Rᵀ + γ tr(LᵀL)·R Rᵀ)/n

a natural-gradient step of rate η is E = −η(Ĝ − I)/2. It is taken as R ← C⁻¹R with C Cᵀ = (1−η)I + ηĜ, which is the same
to first order in η (up to a rotation of R, under which Q stays what it is) and keeps Q positive definite whatever the
batch: (RᵀR)⁻¹ becomes a moving average. For L alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .factors import Factor, inverse_root, spread


def rate_of(rate: float, weight: float) -> float:
    """That of a step, where ``weight`` is 1−(1−rate)ᵏ in float32 at the k-th: exactly 1 at the first, which forgets."""
    return 1.0 if weight <= rate * (1 + 1e-6) else rate / weight


def natural_step(
    factor: Factor, own: Factor, other: Factor, others: Factor, sizes: tuple[int, int], damping: float, rate: Tensor
) -> tuple[Factor, Tensor]:
    """C⁻¹R for R = ``factor``, and whether that worked, a boolean tensor.

    ``own``: G, laid out as R. ``other``: Lᵀ, and ``others`` Ā, laid out as that. ``sizes``: of both sides, (m, n).
    ``rate``: η, a scalar, or a vector where all of these have a dimension in front.
    """
    batch, n = rate.ndim, sizes[1]
    by = _quadratic(other, others, batch) / n
    damped = damping * _square(other, n, batch) / n
    if factor.ndim - batch == 1:
        target = factor.square() * (own * spread(by, own) + spread(damped, own))
    else:
        target = spread(by, own) * (factor @ own @ factor.mT) + spread(damped, own) * (factor @ factor.mT)
    root, right = inverse_root(target * spread(rate, target), 1 - rate)
    return (factor * root if factor.ndim - batch == 1 else root @ factor), right


def _quadratic(factor: Factor, moment: Factor, batch: int) -> Tensor:
    """tr(X M Xᵀ) for X = ``factor``; M is zero where there is padding."""
    product = factor * moment if factor.ndim - batch == 1 else factor @ moment
    return (product * factor).flatten(batch).sum(-1)


def _square(factor: Factor, k: int, batch: int) -> Tensor:
    """tr(X Xᵀ) of the first k rows: those of padding are its own."""
    rows = factor if factor.ndim - batch < 3 else factor.flatten(batch, batch + 1)[..., :k, :]
    return torch.linalg.vector_norm(rows.flatten(batch), dim=-1).square()
