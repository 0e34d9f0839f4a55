"""Where a block's gradient is: a tensor for each part, in the memory where it was found."""

from __future__ import annotations

import torch
from torch import Tensor

from ...algebra.matrix import Matrix
from ...model.block import Block
from ...model.gradients import GradientInPlace
from .coverage import TYPES, BlockFacts


class BlockGradient:
    """A tensor for each part, None for zeros, a factor of them all, and their strides and types."""

    __slots__ = ("factor", "layouts", "tensors")

    def __init__(self, block: Block, facts: BlockFacts, u: Matrix) -> None:
        self.factor: Tensor | None = None
        self.tensors: list[Tensor | None]
        if isinstance(u, GradientInPlace):
            self.tensors = list(u.block.grads)
            if u.scale is not None:
                self.factor = u.scale.to(block.momentum.device, torch.float32)
        else:
            assert isinstance(u, Tensor)
            self.tensors = list(_views(u if u.dtype in TYPES else u.float(), block, facts))
        # A gradient that is to come lies as its parameter, most probably.
        self.layouts = [
            (strides, kind) if t is None else (t.stride(), TYPES[t.dtype])
            for t, (_, strides, kind, _) in zip(self.tensors, facts.layout, strict=True)
        ]


def _views(u: Tensor, block: Block, facts: BlockFacts) -> list[Tensor]:
    """The parts of a matrix (m, n), in the parts' shapes."""
    outer, along = u.stride()
    views = []
    for (shape, *_), offset in zip(facts.layout, facts.offsets, strict=False):
        strides, run = [], along if block.axis else outer
        for d in range(len(shape) - 1, -1, -1):
            strides.append(outer if block.axis and d == 0 else run)
            run *= shape[d]
        start = u.storage_offset() + offset * (along if block.axis else outer)
        views.append(u.as_strided(shape, strides[::-1], start))
    return views
