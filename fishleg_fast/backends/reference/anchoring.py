"""Anchoring, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

from ...algebra.maths import Aux
from ...algebra.structures.base import LayerStatistics
from ...model.block import Block
from ...precision import precision_scope


def average_moments(
    blocks: Sequence[Block], statistics: Sequence[LayerStatistics | Aux], decay: float, more: bool = False
) -> list[Block]:
    """Moving averages of the Kronecker factors, and the blocks whose moved: see ``protocol.Ops``."""
    done = []
    for block, new in zip(blocks, statistics, strict=True):
        if new and block.structure.average(block.moments, new, 1 - decay, 1.0 if more else decay):
            if not more:
                block.moments_weight.mul_(decay).add_(1 - decay)
            done.append(block)
    return done


def start_kfac(blocks: Sequence[Block], damping: float) -> None:
    """Q from the moving averages as they are: see ``protocol.Ops``."""
    with precision_scope("highest"):  # of a triangular inverse that λ starts from
        for block in blocks:
            block.structure.start_kfac(block.moments, damping, block.moments_divisor())
