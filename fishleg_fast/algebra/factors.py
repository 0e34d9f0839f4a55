"""Kronecker factors and their products, whatever their layout.

A factor acts on one side of a block. Its layout is told by its number of dimensions:

    dense           (k, k)
    diagonal        (k,)
    block-diagonal  (c, b, b)   c blocks of b rows, c·b ≥ k; the rows past k meet zeros only
"""

from __future__ import annotations

import torch
from torch import Tensor

Factor = Tensor


def _to_blocks(factor: Factor, x: Tensor) -> Tensor:
    """(k, n) -> (c, b, n), padded with zero rows."""
    c, b, _ = factor.shape
    padding = c * b - x.shape[0]
    if padding:
        x = torch.cat([x, x.new_zeros(padding, x.shape[1])])
    return x.reshape(c, b, x.shape[1])


def mul(factor: Factor, x: Tensor) -> Tensor:
    """F x, for x (k, n)."""
    if factor.ndim == 2:
        return factor @ x
    if factor.ndim == 1:
        return factor[:, None] * x
    return (factor @ _to_blocks(factor, x)).flatten(0, 1)[: x.shape[0]]


def rmul(x: Tensor, factor: Factor) -> Tensor:
    """x F, for x (m, k)."""
    if factor.ndim == 2:
        return x @ factor
    if factor.ndim == 1:
        return x * factor
    return mul(factor.mT, x.T).T


def transpose(factor: Factor, batch: int = 0) -> Factor:
    """Fᵀ, or that of each of many factors, which have ``batch`` dimensions in front."""
    return factor if factor.ndim - batch == 1 else factor.mT


def describe(factor: Factor) -> str:
    """A factor's layout in words: "dense 3 × 3", "diagonal 8000", "2 blocks of 577 × 577"."""
    if factor.ndim == 1:
        return f"diagonal {factor.numel()}"
    size = " × ".join(map(str, factor.shape[-2:]))
    return f"dense {size}" if factor.ndim == 2 else f"{factor.shape[0]} blocks of {size}"


def cross(x: Tensor, y: Tensor, like: Factor) -> Factor:
    """x yᵀ for x, y (k, n), computed only where a factor laid out as ``like`` has entries."""
    if like.ndim == 2:
        return x @ y.T
    if like.ndim == 1:
        return (x * y).sum(1)
    return _to_blocks(like, x) @ _to_blocks(like, y).mT


def compose(f: Factor, g: Factor, out: Factor | None = None) -> Factor:
    """F G, for two factors of the same layout; into ``out`` where that is given."""
    return torch.mul(f, g, out=out) if f.ndim == 1 else torch.matmul(f, g, out=out)


def twice_symmetric(f: Factor) -> Factor:
    """F + Fᵀ."""
    return f + transpose(f)


def diagonal(factor: Factor, k: int, batch: int = 0) -> Tensor:
    """The k diagonal entries of F, or of each of many factors, which have ``batch`` dimensions in front."""
    if factor.ndim - batch == 1:
        return factor
    return factor.diagonal(dim1=-2, dim2=-1).flatten(batch)[..., :k]


def trace(factor: Factor, batch: int = 0) -> Tensor:
    """tr F (padding must be zero), or of each of many factors, which have ``batch`` dimensions in front."""
    return (factor if factor.ndim - batch == 1 else factor.diagonal(dim1=-2, dim2=-1).flatten(batch)).sum(-1)


LEAF = 256  # below it LAPACK's own Cholesky factorisation and triangular inverse are as fast


def inverse_root(factor: Factor, shift: Tensor, weight: Tensor | float = 1.0) -> tuple[Factor, Tensor]:
    """C⁻¹, lower triangular, with C Cᵀ = F/weight + shift·I, so that (F/weight + shift·I)⁻¹ = C⁻ᵀ C⁻¹; and whether that
    worked, a boolean tensor: rounding may cost a factor its positive definiteness.

    ``shift``: a scalar, or a vector for factors with a dimension in front; ``weight`` likewise.
    """
    if factor.ndim - shift.ndim == 1:
        root = (divided(factor.clamp_min(0), weight) + spread(shift, factor)).rsqrt()
        return root, torch.isfinite(root).all(-1)
    root, shifted = torch.zeros_like(factor), divided(factor, weight)
    shifted.diagonal(dim1=-2, dim2=-1).add_(spread(shift, factor)[..., 0])
    info = _inverse_cholesky(shifted, root)
    return root, (info == 0).reshape(*shift.shape, -1).all(-1)


def spread(c: Tensor, x: Tensor) -> Tensor:
    """c with as many dimensions as x, whose first are c's."""
    return c.reshape(*c.shape, *[1] * (x.ndim - c.ndim))


def divided(x: Tensor, weight: Tensor | float) -> Tensor:
    """x over a number, or over one for each of many tensors that have a dimension in front."""
    return x / (spread(weight, x) if isinstance(weight, Tensor) else weight)


def _inverse_cholesky(a: Tensor, out: Tensor) -> Tensor:
    """C⁻¹ of (…, k, k) matrices a = C Cᵀ into the lower triangles of ``out``; a is overwritten.

    Returns LAPACK's info of each, not zero where it failed: to be looked at once, since that makes the host wait.

    By halves, C⁻¹ = [[X₁, 0], [−X₂ C₂₁ X₁, X₂]] with C₂₁ = a₂₁X₁ᵀ: nearly all of it is matrix products, at half the
    time of LAPACK's two factorisations and the transpositions and masks that torch puts around them.
    """
    k = a.shape[-1]
    if k <= LEAF:
        chol, info = torch.linalg.cholesky_ex(a)
        eye = torch.eye(k, dtype=a.dtype, device=a.device)
        out.copy_(torch.linalg.solve_triangular(chol, eye.expand_as(chol), upper=False))
        return info
    h = k // 2
    x1, x2 = out[..., :h, :h], out[..., h:, h:]
    info = _inverse_cholesky(a[..., :h, :h], x1)
    c21 = a[..., h:, :h] @ x1.mT
    info = info | _inverse_cholesky(a[..., h:, h:].sub_(c21 @ c21.mT), x2)
    out[..., h:, :h] = (x2 @ (c21 @ x1)).neg_()
    return info
