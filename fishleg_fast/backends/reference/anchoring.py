"""Anchoring, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

from ...algebra.maths import Aux
from ...algebra.structures.base import LayerStatistics
from ...model.block import Block
from ...precision import precision_scope


def anchor(
    blocks: Sequence[Block],
    statistics: Sequence[LayerStatistics | Aux],
    *,
    decay: float,
    damping: float,
    relative: bool = False,
) -> None:
    """Q from the moving average of the Kronecker factors, with the new ones in it: see ``protocol.Ops``."""
    for block, new in zip(blocks, statistics, strict=True):
        if new and average(block, new, decay):
            start_kfac(block, damping, relative)


def average(block: Block, new: LayerStatistics | Aux, decay: float) -> bool:
    """Average new moments into the block's; whether they were finite."""
    done = block.structure.average(block.moments, new, 1 - decay)
    if done:
        block.moments_weight.mul_(decay).add_(1 - decay)
    return done


def start_kfac(block: Block, damping: float, relative: bool = False) -> None:
    """Q from the block's average as it is."""
    with precision_scope("highest"):  # of a triangular inverse that λ starts from
        block.structure.start_kfac(block.moments, damping, moments_divisor(block, relative))


def moments_divisor(block: Block, relative: bool) -> float:
    """What the block's moments are to be divided by."""
    weight = block.moments_weight.item()
    return block.structure.unit_weight(block.moments, weight) if relative else weight
