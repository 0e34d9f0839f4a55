"""Polar factors, as ``algebra.polar`` has them, by packed products of all blocks: symmetric ones by half their tiles.

That pays for large matrices. torch's batched products, which need no packing, are faster for small ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...algebra.polar import COEFFICIENTS, STEPS_PER_PRODUCT, steps_on_gram
from ...model.block import Block
from .packed_matrix import ENGINES, LEFT, MATRIX_UNITS, RIGHT, PackedMatrix, PackedScratch, ProductBatch, engines
from .state import polar_scratch

LEAST = 256  # of the smaller side that pays


def covers(block: Block, x: Tensor) -> bool:
    """Whether the block's x is for ``polar_factors``, whatever its structure is."""
    engine = ENGINES.get(block.structure.operand_dtype or torch.float64)
    return engine in engines() and x.dtype == torch.float32 and x.is_contiguous() and min(x.shape) >= LEAST


def polar_factors(blocks: Sequence[Block], xs: Sequence[Tensor]) -> None:
    """Replace each x (m, n) by its polar factor; all are covered."""
    if not blocks:
        return
    memory = [polar_scratch(b) for b in blocks]
    batch = ProductBatch(memory[0].engine)
    going = [_Iteration(mine, x, batch).steps() for mine, x in zip(memory, xs, strict=True)]
    while going:
        going = [iteration for iteration in going if next(iteration, False)]
        batch.run()


class _Iteration:
    """X on its way, (k, l) with k ≤ l: x itself or its transpose.

    Generators add to the batch, and yield where it has to be done before they can go on.
    """

    def __init__(self, memory: PackedScratch, x: Tensor, batch: ProductBatch) -> None:
        self.memory, self.batch, self.wide = memory, batch, x.shape[0] <= x.shape[1]
        self.exact = memory.engine not in MATRIX_UNITS
        self.x = x if self.wide else x.T
        self.k, self.l = self.x.shape
        size = torch.linalg.vector_norm(x)
        x.div_(torch.where(size > 0, size, 1))
        self.A, self.A2 = x.new_empty(self.k, self.k), x.new_empty(self.k, self.k)

    def steps(self) -> Iterator[bool]:
        """All of them."""
        together = STEPS_PER_PRODUCT if self.exact and steps_on_gram(self.k, self.l) else 1
        for first in range(0, len(COEFFICIENTS), together):
            self._multiply_by_transpose(self.x, "X", self.A)
            yield True
            if together == 1:
                yield from self._polynomial(first)
                self._move(self.A2)
            else:
                yield from self._steps_of_gram(first, first + together)
            yield True

    def _steps_of_gram(self, first: int, end: int) -> Iterator[bool]:
        """Several steps: A at each, and X ← (product of all B) X at the end."""
        whole: PackedMatrix | None = None
        for step in range(first, end):
            yield from self._polynomial(step)
            B = self.batch.pack(self.A2, self._square(f"B{step - first}"))
            whole = B if whole is None else self._commuting(B, whole, f"whole{step - first}")
            if step + 1 < end:
                A = self.batch.pack(self.A, self._square("A"))
                BA = self._commuting(B, A, "BA")
                yield True
                self.batch.multiply(BA, B.turned(), self.A, symmetric=True)
            yield True
        assert whole is not None
        self._move(whole)

    def _polynomial(self, step: int) -> Iterator[bool]:
        """B of the step in the place of A². Before the first, A is bounded."""
        self._multiply_by_transpose(self.A, "A", self.A2)
        yield True
        if step == 0:
            self._bound()
        a, b, c = COEFFICIENTS[step]
        self.A2.mul_(c).add_(self.A, alpha=b).diagonal().add_(a)

    def _bound(self) -> None:
        """Divide by what bounds the largest singular value: ‖A²‖^¼."""
        largest = torch.linalg.vector_norm(self.A2).sqrt()
        largest = torch.where(largest > 0, largest, 1)
        self.x.div_(largest.sqrt())
        self.A.div_(largest)
        self.A2.div_(largest.square())

    def _square(self, name: str) -> PackedMatrix:
        """Memory for a left operand (k, k)."""
        return self.memory.scratch(name, LEFT, self.k, self.k)

    def _multiply_by_transpose(self, x: Tensor, name: str, out: Tensor) -> None:
        """x xᵀ of a matrix that has k rows."""
        left = self.batch.pack(x, self.memory.scratch(name, LEFT, *x.shape))
        right = left.turned() if self.exact else self.memory.scratch(name, RIGHT, *x.T.shape)
        if not self.exact:
            self.batch.pack(x.T, right)
        self.batch.multiply(left, right, out, symmetric=True)

    def _commuting(self, x: PackedMatrix, y: PackedMatrix, name: str) -> PackedMatrix:
        """x y of symmetric left operands whose product is symmetric."""
        out = self._square(name)
        self.batch.multiply(x, y.turned(), out, symmetric=True)
        return out

    def _move(self, B: Tensor | PackedMatrix) -> None:
        """X ← B X, in the layout of x; B is symmetric."""
        p, k, l = self.memory, self.k, self.l
        if isinstance(B, Tensor):
            B = self.batch.pack(B, p.scratch("B", LEFT if self.wide else RIGHT, k, k))
        elif not self.wide:
            B = B.turned()
        if self.wide:
            self.batch.multiply(B, self.batch.pack(self.x, p.scratch("Y", RIGHT, k, l)), self.x)
        else:
            self.batch.multiply(self.batch.pack(self.x.T, p.scratch("Y", LEFT, l, k)), B, self.x.T)
