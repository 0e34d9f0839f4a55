"""Polar factors, as ``algebra.polar`` has them, by packed products: symmetric ones by half their tiles.

Of float32 operands all of it is in C++ (csrc/cpu/step/polar.cpp). Of bfloat16 ones the products of all blocks are
batched here, which pays for large matrices; torch's batched products, which need no packing, are faster for small ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ... import native
from ...algebra.polar import COEFFICIENTS, STEPS_PER_PRODUCT, steps_on_gram
from ...model.block import Block
from .packed_matrix import ENGINES, LEFT, MATRIX_UNITS, RIGHT, PackedScratch, ProductBatch, engines
from .state import polar_scratch

LEAST = 256  # of the smaller side that pays, of bfloat16 operands


def _engine(block: Block) -> str | None:
    return ENGINES.get(block.structure.operand_dtype or torch.float64)


def covers(block: Block, x: Tensor) -> bool:
    """Whether the block's x is for ``polar_factors``, whatever its structure is."""
    engine = _engine(block)
    known = engine in engines() and x.dtype == torch.float32 and x.is_contiguous()
    return known and (engine not in MATRIX_UNITS or min(x.shape) >= LEAST)


def polar_factors(blocks: Sequence[Block], xs: Sequence[Tensor]) -> None:
    """Replace each x (m, n) by its polar factor; all are covered."""
    by_engine: dict[str, list[tuple[Block, Tensor]]] = {}
    for block, x in zip(blocks, xs, strict=True):
        by_engine.setdefault(_engine(block) or "", []).append((block, x))
    for engine, pairs in by_engine.items():
        if engine in MATRIX_UNITS:
            _batched(engine, pairs)
        else:
            rows = []
            for _, x in pairs:
                k, l = sorted(x.shape)
                rows.append((x.data_ptr(), *x.shape, STEPS_PER_PRODUCT if steps_on_gram(k, l) else 1))
            native.extension().polar_factors(engine, rows, COEFFICIENTS, torch.get_num_threads())
            torch.autograd.graph.increment_version([x for _, x in pairs])


def _batched(engine: str, pairs: Sequence[tuple[Block, Tensor]]) -> None:
    batch = ProductBatch(engine)
    going = [_Iteration(polar_scratch(block), x, batch).steps() for block, x in pairs]
    while going:
        going = [iteration for iteration in going if next(iteration, False)]
        batch.run()


class _Iteration:
    """X on its way, (k, l) with k ≤ l: x itself or its transpose.

    Generators add to the batch, and yield where it has to be done before they can go on.
    """

    def __init__(self, memory: PackedScratch, x: Tensor, batch: ProductBatch) -> None:
        self.memory, self.batch, self.wide = memory, batch, x.shape[0] <= x.shape[1]
        self.x = x if self.wide else x.T
        self.k, self.l = self.x.shape
        size = torch.linalg.vector_norm(x)
        x.div_(torch.where(size > 0, size, 1))
        self.A, self.A2 = x.new_empty(self.k, self.k), x.new_empty(self.k, self.k)

    def steps(self) -> Iterator[bool]:
        """All of them."""
        for step in range(len(COEFFICIENTS)):
            self._multiply_by_transpose(self.x, "X", self.A)
            yield True
            yield from self._polynomial(step)
            self._move(self.A2)
            yield True

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

    def _multiply_by_transpose(self, x: Tensor, name: str, out: Tensor) -> None:
        """x xᵀ of a matrix that has k rows."""
        left = self.batch.pack(x, self.memory.scratch(name, LEFT, *x.shape))
        right = self.batch.pack(x.T, self.memory.scratch(name, RIGHT, *x.T.shape))
        self.batch.multiply(left, right, out, symmetric=True)

    def _move(self, B: Tensor) -> None:
        """X ← B X, in the layout of x; B is symmetric."""
        p, k, l = self.memory, self.k, self.l
        packed = self.batch.pack(B, p.scratch("B", LEFT if self.wide else RIGHT, k, k))
        if self.wide:
            self.batch.multiply(packed, self.batch.pack(self.x, p.scratch("Y", RIGHT, k, l)), self.x)
        else:
            self.batch.multiply(self.batch.pack(self.x.T, p.scratch("Y", LEFT, l, k)), packed, self.x.T)
