"""Products of packed matrices by the extension (csrc/cpu/gemm/products.h), in thin Python.

A matrix is packed once, as a left or a right operand, and used often. What is to be done is collected in a
``ProductBatch``, and done in one call, on torch's threads.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ... import native

LEFT, RIGHT = 0, 1  # Side of csrc/cpu/gemm/engine.h
MATRIX = 0  # Target of csrc/cpu/gemm/products.h; 1 and 2 are the sides
ENGINES = {torch.bfloat16: "amx", torch.float32: "avx512"}  # operands' dtype -> what multiplies them
MATRIX_UNITS = {"amx"}  # which make a low-rank product faster than memory gives it back


@cache
def engines() -> tuple[str, ...]:
    """Those that this processor has; none without the extension."""
    ok, _ = native.available()
    return tuple(native.extension().engines()) if ok else ()


def padded(engine: str, depth: int) -> int:
    """The depth that a packed operand takes up, padding included."""
    step = native.extension().depth_step(engine)
    return -(-depth // step) * step


class PackedMatrix:
    """A matrix (rows, columns) packed as the left operand of a product, or the right one; of its transpose just so."""

    def __init__(self, engine: str, side: int, rows: int, columns: int) -> None:
        self.engine, self.side, self.rows, self.columns = engine, side, rows, columns
        self.lanes, self.depth = (rows, columns) if side == LEFT else (columns, rows)
        size = native.extension().packed_size(engine, self.lanes, self.depth)
        self.memory = torch.empty(size, dtype=torch.uint8, device="cpu")

    @property
    def address(self) -> int:
        """Where the packed numbers begin."""
        return self.memory.data_ptr()

    def turned(self) -> PackedMatrix:
        """The transpose as an operand of the other side: the same memory, in engines that store both alike."""
        assert self.engine not in MATRIX_UNITS
        other = copy(self)
        other.side, other.rows, other.columns = 1 - self.side, self.columns, self.rows
        return other


class PackedScratch:
    """Memory for one block's operands, each of its name for as long as it is in use."""

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self._scratch: dict[tuple[str, int], PackedMatrix] = {}

    def scratch(self, name: str, side: int, rows: int, columns: int) -> PackedMatrix:
        """Memory of that name, from its last use if the size is the same."""
        held = self._scratch.get((name, side))
        if held is None or (held.rows, held.columns) != (rows, columns):
            held = self._scratch[name, side] = PackedMatrix(self.engine, side, rows, columns)
        return held


class ProductBatch:
    """Packings and products of one engine, of which none needs another's result."""

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self._packs: list[tuple[int, ...]] = []
        self._products: list[tuple[int, ...]] = []
        self._kept: list[Tensor] = []  # what addresses point to
        self._then: dict[Any, Callable[[], None]] = {}

    def then(self, key: Any, note: Callable[[], None]) -> None:
        """Once all of this is done, and only then, ``note`` that it is."""
        self._then[key] = note

    def promises(self, key: Any) -> bool:
        """Whether that is to be noted."""
        return key in self._then

    def pack(self, x: Tensor, to: PackedMatrix, after: int = 0) -> PackedMatrix:
        """x (rows, columns) float32 into ``to``; ``after`` so many of the depth, a multiple of ``padded``'s, of others.

        The depth are a left operand's columns, a right one's rows.
        """
        assert x.dtype == torch.float32 and to.engine == self.engine
        if 1 not in x.stride():
            x = x.clone(memory_format=torch.contiguous_format)  # contiguous() leaves a single number's strides
        self._kept += x, to.memory
        if to.side == RIGHT:
            x = x.T  # lanes by depth
        assert x.shape[0] == to.lanes and after + x.shape[1] <= to.depth
        self._packs.append((to.side, x.data_ptr(), *x.shape, *x.stride(), to.address, to.depth, after))
        return to

    def multiply(self, x: PackedMatrix, y: PackedMatrix, out: PackedMatrix | Tensor, symmetric: bool = False) -> None:
        """out = x y, a matrix (float32, rows without gaps) or packed."""
        assert x.side == LEFT and y.side == RIGHT and x.columns == y.rows
        assert x.engine == y.engine == self.engine
        target, address, stride = MATRIX, 0, 0
        if isinstance(out, Tensor):
            assert out.shape == (x.rows, y.columns) and out.stride(1) == 1 and out.dtype == torch.float32
            address, stride = out.data_ptr(), out.stride(0)
            self._kept.append(out)
        else:
            assert (out.rows, out.columns, out.engine) == (x.rows, y.columns, self.engine)
            target, address = out.side + 1, out.address
            self._kept.append(out.memory)
        self._kept += x.memory, y.memory
        row = (x.address, y.address, x.rows, y.columns, x.columns, target, address, stride, symmetric)
        self._products.append(row)

    def run(self) -> None:
        """Pack, then multiply."""
        threads = torch.get_num_threads()
        if self._packs:
            native.extension().pack(self.engine, self._packs, threads)
        if self._products:
            native.extension().multiply(self.engine, self._products, threads)
        for note in self._then.values():
            note()
        self._packs, self._products, self._kept, self._then = [], [], [], {}
