"""Q of Kron blocks by packed products (``panels``), whose sums are float32.

Operands are rounded to bfloat16 where ``precision="medium"`` asks for it, on a processor with a matrix unit; otherwise
they are float32, on one with AVX-512. P, S and what they are made of stay packed; results are matrices, or packed for
the next product. All blocks share each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .panels import ENGINES, LEFT, MATRIX_UNITS, RIGHT, Batch, Panels, engines
from .reference.products import MATHS
from .reference.thin import Thin
from .structure import Version

if TYPE_CHECKING:
    from .blocks import Block


class Packed:
    """One block's P and S as operands: P X and X S. ``version``: of the λ that they are made of."""

    def __init__(self, block: Block, engine: str) -> None:
        self.engine = engine
        self.m, self.n = block.shape
        self.P = Panels(engine, LEFT, self.m, self.m)
        self.S = Panels(engine, RIGHT, self.n, self.n)
        self.version: Version | None = None
        self._rooms: dict[tuple[str, int, int, int], Panels] = {}

    def room(self, name: str, side: int, rows: int, columns: int) -> Panels:
        """Memory for an operand, of that name for as long as it is in use; kept for the next one of its shape."""
        key = (name, side, rows, columns)
        if key not in self._rooms:
            self._rooms = {k: p for k, p in self._rooms.items() if k[:2] != key[:2]}
            self._rooms[key] = Panels(self.engine, side, rows, columns)
        return self._rooms[key]


def takes(block: Block) -> bool:
    """Whether the block's products are to be made here."""
    s = block.structure
    if s.operands not in ENGINES or ENGINES[s.operands] not in engines() or s.maths is not MATHS["kron"]:
        return False
    return all(t.ndim == 2 and t.dtype == torch.float32 for t in s.fishleg_aux.values()) and min(block.shape) > 0


def packed_of(block: Block) -> Packed:
    """What the block keeps."""
    operands = block.structure.operands
    assert operands is not None
    if not isinstance(block.packed, Packed) or block.packed.engine != ENGINES[operands]:
        block.packed = Packed(block, ENGINES[operands])
    return block.packed


def room(block: Block) -> int:
    """Address for Q g of a thin g, where both passes of a step read what the first one makes; 0 where both make it."""
    return 0 if packed_of(block).engine in MATRIX_UNITS else block.room().data_ptr()


def form(blocks: Sequence[Block]) -> None:
    """Make P = RᵀR and S = LLᵀ of today's λ where they are of another."""
    stale = [(b, packed_of(b)) for b in blocks if packed_of(b).version != b.structure.version]
    if not stale:
        return
    batch = Batch(stale[0][1].engine)
    for block, p in stale:
        R, L, m, n = block.structure.fishleg_aux["R"], block.structure.fishleg_aux["L"], p.m, p.n
        left = batch.pack(R.T, p.room("R", LEFT, m, m))
        batch.multiply(left, batch.pack(R, p.room("R", RIGHT, m, m)), p.P, symmetric=True)
        left = batch.pack(L, p.room("L", LEFT, n, n))
        batch.multiply(left, batch.pack(L.T, p.room("L", RIGHT, n, n)), p.S, symmetric=True)
    batch.run()
    for block, p in stale:
        p.version = block.structure.version


def product(blocks: Sequence[Block], us: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """Q u of each block, for a dense u (m, n), into ``outs``."""
    if not blocks:
        return
    form(blocks)
    first, second = (Batch(packed_of(blocks[0]).engine) for _ in range(2))
    for block, u, out in zip(blocks, us, outs, strict=True):
        p = packed_of(block)
        half = p.room("P u", LEFT, p.m, p.n)
        first.multiply(p.P, first.pack(u, p.room("u", RIGHT, p.m, p.n)), half)
        second.multiply(half, p.S, out)
    first.run()
    second.run()


def images(blocks: Sequence[Block], gs: Sequence[Thin]) -> list[tuple[Panels, Panels]]:
    """Q g of thin gradients g = EᵀH, as panels of (E P)ᵀ (m, r) and H S (r, n)."""
    if not blocks:
        return []
    form(blocks)
    batch = Batch(packed_of(blocks[0]).engine)
    found = []
    for block, g in zip(blocks, gs, strict=True):
        p, r = packed_of(block), g.rank
        pair = p.room("P u", LEFT, p.m, r), p.room("H S", RIGHT, r, p.n)
        batch.multiply(p.P, batch.pack(g.E.T, p.room("E", RIGHT, p.m, r)), pair[0])
        batch.multiply(batch.pack(g.H, p.room("H", LEFT, r, p.n)), p.S, pair[1])
        found.append(pair)
    batch.run()
    return found
