"""Anchoring of Kron blocks by packed products (csrc/cpu/anchor), all blocks in two calls.

For ``precision="medium"`` moments are averaged from operands rounded to bfloat16, of which they stay positive
semi-definite. Their roots are not made so: an error in Q relative to its norm would spoil the directions in which Q is
small. There every operand is split into two bfloat16 numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ... import native
from ...algebra.maths import Aux
from ...algebra.structures.base import LayerStatistics
from ...algebra.structures.kron import Kron
from ...model.block import Block
from ..reference import anchoring as reference
from .packed_matrix import engines

Pair = tuple[str, str]
# Operands' dtype -> what multiplies for moments, and for their roots: the first pair that this processor has.
ENGINES: dict[torch.dtype, tuple[Pair, ...]] = {
    torch.bfloat16: (("amx", "amx split"), ("avx512", "avx512")),
    torch.float32: (("avx512", "avx512"),),
}


@torch.no_grad()
def average_moments(
    blocks: Sequence[Block], statistics: Sequence[LayerStatistics | Aux], decay: float, more: bool = False
) -> list[Block]:
    """As the reference's."""
    mine: dict[str, list[tuple[Block, LayerStatistics]]] = {}
    others: list[tuple[Block, LayerStatistics | Aux]] = []
    for block, new in zip(blocks, statistics, strict=True):
        pair = _engines(block, new)
        if pair is None or not isinstance(new, LayerStatistics):
            others.append((block, new))
        else:
            mine.setdefault(pair[0], []).append((block, new))
    done = reference.average_moments([b for b, _ in others], [new for _, new in others], decay, more)
    for engine, found in mine.items():
        done += _average(engine, found, decay, more)
    return done


@torch.no_grad()
def start_kfac(blocks: Sequence[Block], damping: float) -> None:
    """As the reference's."""
    mine: dict[str, list[Block]] = {}
    others: list[Block] = []
    for block in blocks:
        pair = _engines(block, None)
        if pair is None:
            others.append(block)
        else:
            mine.setdefault(pair[1], []).append(block)
    for engine, found in mine.items():
        others += _start(engine, found, damping)  # where float32 does not do the reference repeats it in float64
    reference.start_kfac(others, damping)


def _engines(block: Block, new: LayerStatistics | Aux | None) -> Pair | None:
    """What is to multiply for the block; None where that is torch."""
    s = block.structure
    if type(s) is not Kron or "A" in s.fishleg_aux:
        return None
    matrices = [*s.fishleg_aux.values(), *block.moments.values()]
    if not all(t.ndim >= 2 and t.dtype == torch.float32 and t.is_contiguous() and t.numel() for t in matrices):
        return None
    if isinstance(new, LayerStatistics) and not new.a.dtype == new.e.dtype == torch.float32:
        return None
    here = engines()
    return next((pair for pair in ENGINES.get(s.operand_dtype or torch.float32, ()) if {*pair} <= {*here}), None)


def _average(engine: str, pairs: Sequence[tuple[Block, LayerStatistics]], decay: float, more: bool) -> list[Block]:
    """Average what layers showed into the moments; the blocks for which that was finite."""
    weight, kept, rows = 1 - decay, [], []
    for block, (a, e, count, positions) in pairs:
        a, e = (x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous() for x in (a, e))
        kept.append((a, e))
        G, A = block.moments["rows"], block.moments["columns"]
        rows.append([*_moments(e, G, weight * count), *_moments(a, A, weight / max(positions or a.shape[0], 1))])
    done = native.extension().average_moments(engine, rows, 1.0 if more else decay, torch.get_num_threads())
    found = [block for (block, _), ok in zip(pairs, done, strict=True) if ok]
    for block in found:
        torch.autograd.graph.increment_version(list(block.moments.values()))
        if not more:
            block.moments_weight.mul_(decay).add_(weight)
    return found


def _moments(x: Tensor, out: Tensor, alpha: float) -> Iterator[tuple[int, int, int, int, int, int, float]]:
    """Of the columns of x (positions, k), alone or in groups that have each a part of ``out``."""
    positions, width = x.shape[0], out.shape[-1]
    parts = out.reshape(-1, width, width).unbind()
    for start, part in zip(range(0, x.shape[1], width), parts, strict=True):
        mine = x[:, start : start + width]
        stride = mine.stride(0) if positions > 1 else mine.shape[1]
        yield mine.data_ptr(), positions, mine.shape[1], stride, part.data_ptr(), width, alpha


def _start(engine: str, blocks: Sequence[Block], damping: float) -> list[Block]:
    """R and L from the moments; the blocks for which that failed, whose λ is unchanged."""
    rows = []
    for block in blocks:
        aux, m = block.structure.fishleg_aux, block.moments
        pairs = zip((m["rows"], m["columns"]), (aux["R"], aux["L"]), block.structure.shape, strict=True)
        rows.append((*(_side(*pair) for pair in pairs), float(block.moments_divisor)))
    done = native.extension().start_kfac(engine, rows, damping, torch.get_num_threads())
    for block, ok in zip(blocks, done, strict=True):
        if ok:
            torch.autograd.graph.increment_version(list(block.structure.fishleg_aux.values()))
    return [block for block, ok in zip(blocks, done, strict=True) if not ok]


def _side(moment: Tensor, root: Tensor, size: int) -> tuple[int, int, int, int, int]:
    width = moment.shape[-1]
    return moment.data_ptr(), root.data_ptr(), size, moment.numel() // width**2, width
