"""Polar factors, as ``algebra.polar`` has them, by packed products of all blocks: XXᵀ and A² by half their tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...algebra.polar import COEFFICIENTS
from ...model.block import Block
from .packed_matrix import LEFT, MATRIX_UNITS, RIGHT, PackedMatrix, ProductBatch
from .packed_operator import PackedOperator
from .state import packed_operator


def polar_factors(blocks: Sequence[Block], xs: Sequence[Tensor]) -> None:
    """Replace each x (m, n), rows without gaps, by its polar factor. The blocks have packed products."""
    if not blocks:
        return
    work = [_Iteration(packed_operator(b), x) for b, x in zip(blocks, xs, strict=True)]
    batch = ProductBatch(work[0].operator.engine)
    for step, coefficients in enumerate(COEFFICIENTS):
        for w in work:
            w.multiply_gram(batch)
        batch.run()
        for w in work:
            w.square_gram(batch)
        batch.run()
        if step == 0:
            for w in work:
                w.bound()
        for w in work:
            w.move(batch, *coefficients)
        batch.run()


class _Iteration:
    """X on its way, (k, l) with k ≤ l: x itself or its transpose."""

    def __init__(self, operator: PackedOperator, x: Tensor) -> None:
        self.operator, self.wide = operator, x.shape[0] <= x.shape[1]
        self.x = x if self.wide else x.T
        self.k, self.l = self.x.shape
        size = torch.linalg.vector_norm(x)
        x.div_(torch.where(size > 0, size, 1))
        self.A, self.A2 = x.new_empty(self.k, self.k), x.new_empty(self.k, self.k)

    def _with_transpose(self, batch: ProductBatch, x: Tensor, name: str) -> tuple[PackedMatrix, PackedMatrix]:
        """x as a left operand, and xᵀ as a right one."""
        rows, columns = x.shape
        left = batch.pack(x, self.operator.scratch(name, LEFT, rows, columns))
        if self.operator.engine not in MATRIX_UNITS:
            return left, left.turned()
        return left, batch.pack(x.T, self.operator.scratch(name, RIGHT, columns, rows))

    def multiply_gram(self, batch: ProductBatch) -> None:
        """A = X Xᵀ."""
        left, right = self._with_transpose(batch, self.x, "polar X")
        batch.multiply(left, right, self.A, symmetric=True)

    def square_gram(self, batch: ProductBatch) -> None:
        """A² = A Aᵀ."""
        left, right = self._with_transpose(batch, self.A, "polar A")
        batch.multiply(left, right, self.A2, symmetric=True)

    def bound(self) -> None:
        """Divide by what bounds the largest singular value: ‖A²‖^¼."""
        largest = torch.linalg.vector_norm(self.A2).sqrt()
        largest = torch.where(largest > 0, largest, 1)
        self.x.div_(largest.sqrt())
        self.A.div_(largest)
        self.A2.div_(largest.square())

    def move(self, batch: ProductBatch, a: float, b: float, c: float) -> None:
        """X ← (aI + bA + cA²) X; in the layout of x."""
        B = self.A2.mul_(c).add_(self.A, alpha=b)
        B.diagonal().add_(a)
        p, k, l = self.operator, self.k, self.l
        if self.wide:
            left, right = p.scratch("polar B", LEFT, k, k), p.scratch("polar Y", RIGHT, k, l)
            batch.multiply(batch.pack(B, left), batch.pack(self.x, right), self.x)
        else:
            left, right = p.scratch("polar Y", LEFT, l, k), p.scratch("polar B", RIGHT, k, k)
            batch.multiply(batch.pack(self.x.T, left), batch.pack(B, right), self.x.T)
