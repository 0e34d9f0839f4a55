"""Matrices of low rank, which a layer's gradient is on a batch smaller than the layer, and what they cost.

A Linear's gradient is EᵀH, with E (r, m) the output gradients and H (r, n) the inputs of r positions (samples, or
samples × time). Q of a Kronecker structure keeps the form: Q (EᵀH) = (E P)ᵀ (H S).

All choices between routes are made here, by counts of multiply-adds; a factor costs its number of entries for each
vector it is applied to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..blocks import Block


@dataclass(frozen=True, eq=False)
class Thin:
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

    def to(self, dtype: torch.dtype | None) -> Thin:
        """The same in another dtype; None: as it is."""
        return self if dtype is None else Thin(self.E.to(dtype), self.H.to(dtype))

    def scaled(self, c: Tensor | float) -> Thin:
        """c EᵀH."""
        return Thin(self.E * c, self.H)


@dataclass(frozen=True, eq=False)
class Image(Thin):
    """Q u of a thin u = EᵀH, and of each Kronecker term E Rᵀ and H L, where they were computed on the way."""

    halves: tuple[tuple[Tensor | None, Tensor | None], ...] = ()


@dataclass(frozen=True, eq=False)
class Sum:
    """A dense matrix W (m, n), if there is one, and a thin one, added up."""

    whole: Tensor | None
    thin: Thin

    @staticmethod
    def of(*terms: Tensor | Thin) -> Sum:
        """At most one dense matrix, and thin ones."""
        thin = [t for t in terms if isinstance(t, Thin)]
        joined = Thin(torch.cat([t.E for t in thin]), torch.cat([t.H for t in thin]))
        return Sum(next((t for t in terms if isinstance(t, Tensor)), None), joined)

    def left(self, x: Tensor) -> Tensor:
        """x W, for x (r, m)."""
        product = (x @ self.thin.E.T) @ self.thin.H
        return product if self.whole is None else product.addmm_(x, self.whole)

    def right(self, x: Tensor) -> Tensor:
        """x Wᵀ, for x (r, n)."""
        product = (x @ self.thin.H.T) @ self.thin.E
        return product if self.whole is None else product.addmm_(x, self.whole.T)

    def to(self, dtype: torch.dtype | None) -> Sum:
        """The same in another dtype; None: as it is."""
        whole = self.whole if self.whole is None or dtype is None else self.whole.to(dtype)
        return Sum(whole, self.thin.to(dtype))


@dataclass(frozen=True, eq=False)
class Split:
    """A block's gradient (m, n) where its parameters hold it, in ``block.grads``: no copy until one is needed."""

    block: Block
    scale: Tensor | None = None  # a factor: a scalar

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)"""
        return self.block.shape

    @cached_property
    def dense(self) -> Tensor:
        """(m, n) in λ's dtype: a view of the gradient where that is possible. Not to be written to."""
        whole = self.block.matrix(self.block.grads)
        return whole if self.scale is None else whole * self.scale.to(whole)

    def scaled(self, c: Tensor) -> Split:
        """c times this."""
        return Split(self.block, c if self.scale is None else self.scale * c)


Matrix = Tensor | Thin | Split


def dense(x: Matrix) -> Tensor:
    """(m, n)"""
    return x if isinstance(x, Tensor) else x.dense


def dot(x: Matrix, y: Matrix) -> Tensor:
    """⟨x, y⟩, a scalar."""
    if isinstance(x, Thin) and x is y and x.square is not None:
        return x.E.new_tensor(x.square)
    if isinstance(x, Thin) and isinstance(y, Thin):
        y = y.to(x.E.dtype)  # v and F v can be of another dtype than u
        return torch.sum((x.E @ y.E.T) * (x.H @ y.H.T))
    if isinstance(x, Thin):
        y = dense(y)
        x = x.to(y.dtype)
        return torch.sum(x.E * (x.H @ y.T))
    if x is y:  # torch's dot products do not use all threads
        whole = dense(x)
        wide = torch.float64 if whole.dtype == torch.float64 else torch.float32
        return torch.linalg.vector_norm(whole, dtype=wide).square()
    return torch.dot(dense(x).reshape(-1), dense(y).reshape(-1))


def is_zero(x: Tensor) -> Tensor:
    """Whether all entries are zero: a boolean scalar."""
    if not x.numel():
        return torch.ones((), dtype=torch.bool, device=x.device)
    least, most = torch.aminmax(x)  # any() takes six times as long on a CPU
    return (least == 0) & (most == 0)


def forms(factor: Tensor, vectors: int | None) -> bool:
    """Whether it pays to form RᵀR (or LLᵀ) for ``vectors`` products with it; None, unknown: many.

    Forming costs a factor of width b as much as applying it b times; it saves one of two applications each time.
    """
    return vectors is None or factor.ndim == 1 or factor.shape[-1] <= vectors


def thin_pays(R: Tensor, L: Tensor, m: int, n: int, rank: int) -> bool:
    """Whether (E P)ᵀ(H S) costs less than P (EᵀH) S, with EᵀH at hand in either form."""
    return rank * (R.numel() + L.numel() + m * n) < n * R.numel() + m * L.numel()


def outer_pays(factor: Tensor, rank: int) -> bool:
    """Whether (M+Mᵀ)L with M = XᵀY of ``rank`` costs less as Xᵀ(Y L) + Yᵀ(X L) than by way of M.

    By M: rank·numel for M, width·numel for its product with L. Thin: two products with L and two outer products.
    """
    return factor.ndim == 2 and 4 * rank < rank + factor.shape[-1]


def vectors(u: Matrix, times: int, whole: int) -> tuple[int, int]:
    """How many columns P, and rows S, meets in so many products with u, and ``whole`` ones with a dense matrix."""
    m, n = u.shape
    columns, rows = (u.rank, u.rank) if isinstance(u, Thin) else (n, m)
    return times * columns + whole * n, times * rows + whole * m
