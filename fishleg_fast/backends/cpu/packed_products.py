"""Q of Kron blocks by packed products (``packed_matrix``), whose sums are float32.

Operands are rounded to bfloat16 where ``precision="medium"`` asks for it, on a processor with a matrix unit; otherwise
they are float32, on one with AVX-512. P, S and what they are made of stay packed; results are matrices, or packed for
the next product. All blocks share each call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...algebra.low_rank import LowRank, LowRankProduct
from ...algebra.matrix import Matrix, dense
from ...algebra.structures.kron import KRON, kron_low_rank_qv
from ...model.block import Block
from .packed_matrix import ENGINES, LEFT, MATRIX_UNITS, RIGHT, PackedMatrix, ProductBatch, engines
from .state import packed_operator


def covers(block: Block) -> bool:
    """Whether the block's products are to be made here."""
    s = block.structure
    if s.operand_dtype not in ENGINES or ENGINES[s.operand_dtype] not in engines() or s.maths is not KRON:
        return False
    aux = s.fishleg_aux.values()
    return all(t.ndim == 2 and t.dtype == torch.float32 and t.is_contiguous() for t in aux) and min(block.shape) > 0


def matrix_unit(block: Block) -> bool:
    """Whether products are so fast that memory decides."""
    return packed_operator(block).engine in MATRIX_UNITS


def scratch_address(block: Block) -> int:
    """Address for Q g of a low-rank g, where both passes of a step read what the first makes; 0 where both make it."""
    return 0 if matrix_unit(block) else block.scratch().data_ptr()


def form(blocks: Sequence[Block]) -> None:
    """Make P = RᵀR and S = LLᵀ of today's λ where they are of another."""
    stale = [(block, p) for block in blocks if (p := packed_operator(block)).stale]
    if stale:
        batch = ProductBatch(stale[0][1].engine)
        for _, p in stale:
            p.form(batch)
        batch.run()
        for block, p in stale:
            if not block.exp_avg:  # where λ is learned its gradients take them
                p.forget_factors()


def row_major_like(x: Tensor) -> Tensor:
    """Memory for a matrix, row by row however x is laid out."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def product(blocks: Sequence[Block], us: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """Q u of each block, for a dense u (m, n), into ``outs``."""
    if not blocks:
        return
    form(blocks)
    first, second = (ProductBatch(packed_operator(blocks[0]).engine) for _ in range(2))
    for block, u, out in zip(blocks, us, outs, strict=True):
        p = packed_operator(block)
        half = p.scratch("P u", LEFT, p.m, p.n)
        first.multiply(p.P, first.pack(u, p.scratch("u", RIGHT, p.m, p.n)), half)
        second.multiply(half, p.S, out)
    first.run()
    second.run()


def low_rank_products(blocks: Sequence[Block], gs: Sequence[LowRank]) -> list[tuple[PackedMatrix, PackedMatrix]]:
    """Q g of low-rank gradients g = EᵀH, packed: (E P)ᵀ (m, r) and H S (r, n)."""
    if not blocks:
        return []
    form(blocks)
    batch = ProductBatch(packed_operator(blocks[0]).engine)
    found = []
    for block, g in zip(blocks, gs, strict=True):
        p, r = packed_operator(block), g.rank
        pair = p.scratch("P u", LEFT, p.m, r), p.scratch("H S", RIGHT, r, p.n)
        batch.multiply(p.P, batch.pack(g.E.T, p.scratch("E", RIGHT, p.m, r)), pair[0])
        batch.multiply(batch.pack(g.H, p.scratch("H", LEFT, r, p.n)), p.S, pair[1])
        found.append(pair)
    batch.run()
    return found


def qv(blocks: Sequence[Block], us: Sequence[Matrix]) -> list[Matrix]:
    """Q u of each block: of a low-rank u by its factors, whose products the λ-gradient takes too."""
    whole = [k for k, u in enumerate(us) if not isinstance(u, LowRank)]
    found: dict[int, Matrix] = {k: row_major_like(dense(us[k])) for k in whole}
    product([blocks[k] for k in whole], [dense(us[k]) for k in whole], [dense(found[k]) for k in whole])
    low_rank = {k: u for k, u in enumerate(us) if isinstance(u, LowRank)}
    if low_rank and not matrix_unit(blocks[0]):  # to pack factors that are used twice costs more than it saves
        found |= {k: kron_low_rank_qv(blocks[k].structure.fishleg_aux, {}, u) for k, u in low_rank.items()}
    elif low_rank:
        found |= _low_rank_qv(blocks, low_rank)
    return [found[k] for k in range(len(blocks))]


def _low_rank_qv(blocks: Sequence[Block], low_rank: dict[int, LowRank]) -> dict[int, LowRankProduct]:
    batch = ProductBatch(packed_operator(blocks[0]).engine)
    halves, found = {}, {}
    for k, u in low_rank.items():
        p, r = packed_operator(blocks[k]), u.rank
        REt, HL = u.E.new_empty(p.m, r), u.E.new_empty(r, p.n)
        batch.multiply(p.factor(batch, "R", LEFT), batch.pack(u.E.T, p.scratch("E", RIGHT, p.m, r)), REt)
        batch.multiply(batch.pack(u.H, p.scratch("H", LEFT, r, p.n)), p.factor(batch, "L", RIGHT), HL)
        halves[k] = REt, HL
    batch.run()
    for k, (REt, HL) in halves.items():
        p, r = packed_operator(blocks[k]), HL.shape[0]
        PEt, HS = torch.empty_like(REt), torch.empty_like(HL)
        batch.multiply(p.factor(batch, "R'", LEFT), batch.pack(REt, p.scratch("E", RIGHT, p.m, r)), PEt)
        batch.multiply(batch.pack(HL, p.scratch("H", LEFT, r, p.n)), p.factor(batch, "L'", RIGHT), HS)
        found[k] = LowRankProduct(PEt.T, HS, ((REt.T, HL),))
    batch.run()
    return found
