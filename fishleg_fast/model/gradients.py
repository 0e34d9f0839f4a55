"""A block's gradient where autograd left it: in the memory of its parameters' gradients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from .block import Block


@dataclass(frozen=True, eq=False)
class GradientInPlace:
    """A block's gradient (m, n) where its parameters hold it, in ``block.grads``: no copy until one is needed."""

    block: Block
    scale: Tensor | None = None  # a factor: a scalar

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)"""
        return self.block.shape

    @cached_property
    def dense(self) -> Tensor:
        """(m, n) in λ's dtype: a view of the gradient where that is possible. Not to be written to."""
        whole = self.block.matrix(self.block.grads)
        return whole if self.scale is None else whole * self.scale.to(whole)

    def scaled(self, c: Tensor) -> GradientInPlace:
        """c times this."""
        return GradientInPlace(self.block, c if self.scale is None else self.scale * c)
