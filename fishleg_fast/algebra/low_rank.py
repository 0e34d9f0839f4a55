"""Matrices of low rank, which a layer's gradient is on a batch smaller than the layer.

A Linear's gradient is EᵀH, with E (r, m) the output gradients and H (r, n) the inputs of r positions (samples, or
samples × time). Q of a Kronecker structure keeps the form: Q (EᵀH) = (E P)ᵀ (H S).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """The matrix EᵀH (m, n), as E (r, m) and H (r, n). ``square``: ‖EᵀH‖² where that is known."""

    E: Tensor
    H: Tensor
    square: float | None = field(default=None, kw_only=True)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)"""
        return self.E.shape[1], self.H.shape[1]

    @property
    def rank(self) -> int:
        """r: positions, an upper bound of the matrix's rank."""
        return self.E.shape[0]

    @cached_property
    def dense(self) -> Tensor:
        """(m, n)"""
        return self.E.T @ self.H

    def into(self, out: Tensor) -> None:
        """Write the matrix (m, n) to ``out``."""
        torch.mm(self.E.to(out.dtype).T, self.H.to(out.dtype), out=out)

    def to(self, dtype: torch.dtype | None) -> LowRank:
        """The same in another dtype; None: as it is."""
        return self if dtype is None else LowRank(self.E.to(dtype), self.H.to(dtype))

    def scaled(self, c: Tensor | float) -> LowRank:
        """c EᵀH."""
        return LowRank(self.E * c, self.H)


@dataclass(frozen=True, eq=False)
class LowRankProduct(LowRank):
    """Q u of a low-rank u = EᵀH, and of each Kronecker term E Rᵀ and H L, where they were computed on the way."""

    halves: tuple[tuple[Tensor | None, Tensor | None], ...] = ()


@dataclass(frozen=True, eq=False)
class DenseAndLowRank:
    """A dense matrix W (m, n), if there is one, and a low-rank one, added up."""

    dense_term: Tensor | None
    low_rank: LowRank

    @staticmethod
    def of(*terms: Tensor | LowRank) -> DenseAndLowRank:
        """At most one dense matrix, and low-rank ones."""
        low_rank = [t for t in terms if isinstance(t, LowRank)]
        joined = LowRank(torch.cat([t.E for t in low_rank]), torch.cat([t.H for t in low_rank]))
        return DenseAndLowRank(next((t for t in terms if isinstance(t, Tensor)), None), joined)

    @property
    def dense(self) -> Tensor:
        """(m, n)"""
        return self.low_rank.dense if self.dense_term is None else self.dense_term + self.low_rank.dense

    def left(self, x: Tensor) -> Tensor:
        """x W, for x (r, m)."""
        product = (x @ self.low_rank.E.T) @ self.low_rank.H
        return product if self.dense_term is None else product.addmm_(x, self.dense_term)

    def right(self, x: Tensor) -> Tensor:
        """x Wᵀ, for x (r, n)."""
        product = (x @ self.low_rank.H.T) @ self.low_rank.E
        return product if self.dense_term is None else product.addmm_(x, self.dense_term.T)

    def to(self, dtype: torch.dtype | None) -> DenseAndLowRank:
        """The same in another dtype; None: as it is."""
        term = self.dense_term if self.dense_term is None or dtype is None else self.dense_term.to(dtype)
        return DenseAndLowRank(term, self.low_rank.to(dtype))
