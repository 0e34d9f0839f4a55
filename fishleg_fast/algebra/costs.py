"""Which way to a product pays, by counts of multiply-adds: all choices between routes are made here.

A factor costs its number of entries for each vector it is applied to.
"""

from __future__ import annotations

from torch import Tensor

from .low_rank import LowRank
from .matrix import Matrix

DENSE = 1024  # a factor of at most this size is dense, whatever its block's other side is
ASPECT = 4  # so is one of at most so many times the other side: λ is then no larger than so many blocks
LARGEST = 8192  # no dense matrix is larger
PARTS = 4  # a factor that would take more of them than this is diagonal


def affordable_layout(m: int, n: int) -> tuple[tuple[str, ...], int]:
    """Which factors of an (m, n) block are to be diagonal, and the size of a dense one, above which factors become
    block-diagonal, so that λ and products with Q cost no more than a few times what the block itself does.
    """
    limit = min(max(DENSE, ASPECT * min(m, n)), LARGEST)
    return tuple(side for side, k in (("R", m), ("L", n)) if k > PARTS * limit), limit


def forming_pays(factor: Tensor, applications: int | None) -> bool:
    """Whether it pays to form RᵀR (or LLᵀ) for so many applications of it; None, unknown: many.

    Forming costs a factor of width b as much as applying it b times; it saves one of two applications each time.
    """
    return applications is None or factor.ndim == 1 or factor.shape[-1] <= applications


def low_rank_pays(R: Tensor, L: Tensor, m: int, n: int, rank: int) -> bool:
    """Whether (E P)ᵀ(H S) costs less than P (EᵀH) S, with EᵀH at hand in either form."""
    return rank * (R.numel() + L.numel() + m * n) < n * R.numel() + m * L.numel()


def outer_products_pay(factor: Tensor, rank: int) -> bool:
    """Whether (M+Mᵀ)L with M = XᵀY of ``rank`` costs less as Xᵀ(Y L) + Yᵀ(X L) than by way of M.

    By M: rank·numel for M, width·numel for its product with L. Of low rank: two products with L and two outer products.
    """
    return factor.ndim == 2 and 4 * rank < rank + factor.shape[-1]


def count_applications(u: Matrix, times: int, whole: int) -> tuple[int, int]:
    """How many columns P, and rows S, meets in so many products with u, and ``whole`` ones with a dense matrix."""
    m, n = u.shape
    columns, rows = (u.rank, u.rank) if isinstance(u, LowRank) else (n, m)
    return times * columns + whole * n, times * rows + whole * m
