"""Cached products, Q u and inner products over lists of blocks, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...algebra.low_rank import LowRank
from ...algebra.maths import Applications
from ...algebra.matrix import Matrix, dense, dot
from ...model.block import Block


def refresh(blocks: Sequence[Block], applications: Sequence[Applications] | None = None) -> None:
    """Each structure's own ``refresh``."""
    for block, count in zip(blocks, applications or [None] * len(blocks), strict=True):
        block.structure.refresh(count)


def qv(blocks: Sequence[Block], us: Sequence[Matrix]) -> list[Matrix]:
    """Q u of each block."""
    return [
        b.structure.low_rank_product(u) if isinstance(u, LowRank) else b.structure.product(dense(u))
        for b, u in zip(blocks, us, strict=True)
    ]


def inner(xs: Sequence[Matrix], ys: Sequence[Matrix]) -> Tensor:
    """Σ ⟨x, y⟩."""
    return stacked([dot(x, y) for x, y in zip(xs, ys, strict=True)]).sum()


def common_dtype(things: Sequence[Tensor | Block]) -> torch.dtype:
    """float64 where anything is, float32 otherwise."""
    return torch.float64 if any(x.dtype == torch.float64 for x in things) else torch.float32


def stacked(scalars: Sequence[Tensor]) -> Tensor:
    """Scalars of whatever dtype and device -> one vector on the first one's device."""
    wide = common_dtype(scalars)
    return torch.stack([s.to(scalars[0].device, wide) for s in scalars])
