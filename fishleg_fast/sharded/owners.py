"""Which rank has the λ of which block."""

from __future__ import annotations

from collections.abc import Sequence

from ..model.block import Block

STATES = 5  # of λ's size: itself, Adam's two moments, the Fisher's moments, and P and S


def state_entries(block: Block) -> int:
    """Numbers that the owner of a block holds, nearly: λ and what is of its size, the momentum, and the update."""
    m, n = block.shape
    return STATES * sum(t.numel() for t in block.structure.fishleg_aux.values()) + 2 * m * n


def assign_owners(blocks: Sequence[Block], ranks: int) -> list[int]:
    """An owner for each block, such that all hold about as much: the largest first, each to who has least so far.

    By size alone, which the arithmetic of a block follows, so that all ranks find the same.
    """
    loads, owners = [0] * ranks, [0] * len(blocks)
    for k in sorted(range(len(blocks)), key=lambda k: (-state_entries(blocks[k]), k)):
        owners[k] = min(range(ranks), key=lambda r: (loads[r], r))
        loads[owners[k]] += state_entries(blocks[k])
    return owners
