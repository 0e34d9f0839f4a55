"""Equal blocks as one, with a dimension in front: an operation on all of them is one operation.

Blocks are equal where their matrices have one shape, their structures can be put together, and their parameters and
what is given for each lie alike. At most ``algebra.stacks.ENTRIES`` entries are put together.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..algebra.low_rank import LowRank
from ..algebra.matrix import Matrix, dense
from ..algebra.stacks import alike, together
from ..algebra.structures import stacked
from ..algebra.structures.base import Structure
from .block import Block
from .gradients import GradientInPlace


@dataclass(frozen=True)
class Stack:
    """Equal blocks, and which they are in the list that they come from."""

    blocks: list[Block]
    numbers: list[int]

    @property
    def structures(self) -> list[Structure]:
        """Of each block."""
        return [b.structure for b in self.blocks]

    def of(self, given: Sequence[Any]) -> list[Any]:
        """What a list has for these blocks."""
        return [given[k] for k in self.numbers]

    def matrices(self, given: Sequence[Matrix]) -> Tensor:
        """What a list has for these blocks, as ``matrices``."""
        return matrices(self.of(given))

    def split(self, matrices: Tensor) -> list[Tensor]:
        """(count, m, n) -> one tensor a part, (count, *its shape); views where that is possible."""
        sizes, shapes = self.blocks[0].layout
        pieces = matrices.split(sizes, dim=self.blocks[0].axis + 1)
        return [piece.reshape(len(self.blocks), *s) for s, piece in zip(shapes, pieces, strict=True)]


def matrices(xs: Sequence[Matrix]) -> Tensor:
    """(count, m, n) of matrices that lie alike, none of low rank; a view where that is possible. Not to be written
    to.
    """
    held = [x for x in xs if isinstance(x, GradientInPlace)]
    if len(held) < max(len(xs), 2):
        return together([dense(x) for x in xs])
    parts = zip(*[x.block.grads for x in held], strict=True)
    whole = assembled(held[0].block, [_together(g) for g in parts], len(held))
    scales = [x.scale for x in held if x.scale is not None]
    return whole * together(scales).to(whole)[:, None, None] if scales else whole


def _together(tensors: Sequence[Tensor | None]) -> Tensor | None:
    return None if tensors[0] is None else together([t for t in tensors if t is not None])


def assembled(block: Block, parts: Sequence[Tensor | None], count: int) -> Tensor:
    """One tensor a part of equal blocks, (count, *its shape), None for zeros -> (count, m, n) in λ's dtype."""
    m, axis = block.shape[0], block.axis
    sizes, _ = block.layout
    pieces = []
    for size, given in zip(sizes, parts, strict=True):
        rows, columns = (m, size) if axis else (size, 1)
        if given is None:
            given = block.momentum.new_zeros(count, rows, columns)
        pieces.append(given.reshape(count, rows, columns))
    whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=axis + 1)
    return whole.to(block.dtype)


def stacks_of(blocks: Sequence[Block], *given: Sequence[Matrix], more: Sequence[Hashable] = ()) -> list[Stack]:
    """The blocks, equal ones together: those for which the matrices ``given`` lie alike, and ``more`` is equal, too."""
    keys: list[Hashable | None] = []
    for k, block in enumerate(blocks):
        own = (_kind(block), *[lies(xs[k]) for xs in given])
        keys.append(None if None in own else (*own, more[k] if more else None))
    groups = alike(keys, [b.momentum.numel() for b in blocks])
    return [Stack([blocks[k] for k in group], group) for group in groups]


def _kind(block: Block) -> Hashable | None:
    """Equal where blocks can be put together, None where this one cannot."""
    structure = stacked.kind(block.structure)
    return None if structure is None else (structure, block.axis, block.dtype, tuple(block.layout[1]), _dtypes(block))


def _dtypes(block: Block) -> tuple:
    return tuple(p.dtype for p in block.params)


def lies(x: Matrix) -> Hashable | None:
    """Equal where matrices lie alike, None where this one cannot be put together with others."""
    if isinstance(x, Tensor):
        return x.shape, x.dtype, x.device
    if isinstance(x, LowRank) or not isinstance(x, GradientInPlace):
        return None
    block = x.block
    grads = tuple(None if g is None else (g.dtype, g.device) for g in block.grads)
    return block.axis, block.dtype, tuple(block.layout[1]), x.scale is None, grads


def assembled_matrices(blocks: Sequence[Block], tensors: Sequence[Sequence[Tensor | None]]) -> list[Tensor]:
    """One tensor a part of each block, None for zeros -> (m, n) of each in λ's dtype."""
    keys = [
        (b.axis, b.dtype, tuple(b.layout[1]), tuple(None if t is None else (t.dtype, t.device) for t in ts))
        for b, ts in zip(blocks, tensors, strict=True)
    ]
    found: list[Tensor] = [blocks[k].momentum for k in range(len(blocks))]
    for group in alike(keys, [b.momentum.numel() for b in blocks]):
        parts = [_together(ts) for ts in zip(*[tensors[k] for k in group], strict=True)]
        for k, matrix in zip(group, assembled(blocks[group[0]], parts, len(group)).unbind(), strict=True):
            found[k] = matrix
    return found


def scaled(xs: Sequence[Matrix], scales: Tensor) -> list[Matrix]:
    """c x of each x, by a vector of scalars c."""
    cs = scales.unbind()
    found: list[Matrix] = list(xs)
    keys = [lies(x) if isinstance(x, Tensor) else None for x in xs]
    for group in alike(keys, [x.numel() if isinstance(x, Tensor) else 0 for x in xs]):
        tensors = [x for k in group if isinstance(x := xs[k], Tensor)]
        if not tensors:
            (k,), x = group, xs[group[0]]
            assert not isinstance(x, Tensor)
            found[k] = x.scaled(cs[k])
            continue
        whole = together(tensors)
        c = together([cs[k] for k in group]).to(whole)
        for k, product in zip(group, (whole * c.reshape(-1, *[1] * (whole.ndim - 1))).unbind(), strict=True):
            found[k] = product
    return found
