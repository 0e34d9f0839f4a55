"""The polar factor U Vᵀ of matrices X = U Σ Vᵀ, by odd polynomials: only products of matrices.

X ← a X + (b A + c A²) X with A = X Xᵀ, six times, moves every singular value to 1. The coefficients are those that
bring [3e-4, 1] as near to 1 as six such steps can, one after the other (Amsel, Persson, Musco & Gower, The Polar
Express, 2025: the greedy choice is the best one), with 1 % to spare for rounding: to [0.92, 1.08]. Smaller ones get
nearer to 1, and zero stays zero.

Where products are exact to float32 most of it can happen to A alone: with B = aI + bA + cA², which A commutes with,
the next step's A is B²A, and several steps end in one product of X and all their B. X is renewed after every third
step, and A formed of it: else A's rounding errors, as large as its smallest eigenvalues are small, would end up in X.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 3e-4  # of the singular values that reach 1, over the largest
COEFFICIENTS = (
    (8.417026, -24.487974, 17.817396),
    (4.193082, -3.052485, 0.556386),
    (4.1245, -3.006069, 0.551266),
    (3.864137, -2.827928, 0.531637),
    (3.123043, -2.299266, 0.473766),
    (2.163546, -1.523818, 0.392132),
)


STEPS_PER_PRODUCT = 3  # with X, where products are exact


def steps_on_gram(k: int, l: int) -> bool:
    """Whether several steps on A of X (k, l), k ≤ l, cost less than each step on X."""
    return 2 * k <= l


def polar_factors(xs: Sequence[Tensor], exact: bool = False) -> list[Tensor]:
    """The polar factor of each x (m, n), new tensors; those of one shape together. Of zeros, zeros.

    ``exact``: products of float32 matrices are so here, neither TF32 nor bfloat16.
    """
    by_shape: dict[tuple, list[int]] = {}
    for k, x in enumerate(xs):
        by_shape.setdefault((*sorted(x.shape), x.dtype, x.device), []).append(k)
    found = list(xs)
    for indices in by_shape.values():
        wide = torch.stack([xs[k] if xs[k].shape[0] <= xs[k].shape[1] else xs[k].T for k in indices])
        polar = _polar_by_gram if exact and steps_on_gram(*wide.shape[1:]) else _polar
        for k, y in zip(indices, polar(wide), strict=True):
            found[k] = y if xs[k].shape[0] <= xs[k].shape[1] else y.T
    return found


def _polar(x: Tensor) -> Tensor:
    """Of a batch of matrices (count, m, n) with m ≤ n; x is overwritten."""
    _shrink(x)
    for step, (a, b, c) in enumerate(COEFFICIENTS):
        A = x @ x.mT
        A2 = A @ A
        if step == 0:
            _bound(x, A, A2)
        x = torch.baddbmm(x, A2.mul_(c).add_(A, alpha=b), x, beta=a)
    return x


def _polar_by_gram(x: Tensor) -> Tensor:
    """The same, several steps to a product with x."""
    _shrink(x)
    for first in range(0, len(COEFFICIENTS), STEPS_PER_PRODUCT):
        A = x @ x.mT
        whole = x.new_empty(0)  # of this stage's steps
        for step in range(first, first + STEPS_PER_PRODUCT):
            a, b, c = COEFFICIENTS[step]
            A2 = A @ A
            if step == 0:
                _bound(x, A, A2)
            B = A2.mul_(c).add_(A, alpha=b)
            B.diagonal(dim1=-2, dim2=-1).add_(a)
            whole = B if step == first else B @ whole
            if step + 1 < first + STEPS_PER_PRODUCT:
                A = B @ A @ B
        x = whole @ x
    return x


def _shrink(x: Tensor) -> None:
    """To norm 1, which no later product of what is finite overflows."""
    size = torch.linalg.matrix_norm(x, keepdim=True)
    x.div_(torch.where(size > 0, size, 1))


def _bound(x: Tensor, A: Tensor, A2: Tensor) -> None:
    """Divide by what bounds the largest singular value, within m^⅛: ‖A²‖^¼."""
    largest = torch.linalg.matrix_norm(A2, keepdim=True).sqrt()
    largest = torch.where(largest > 0, largest, 1)
    x.div_(largest.sqrt())
    A.div_(largest)
    A2.div_(largest.square())
