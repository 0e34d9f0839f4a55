"""The memory that a block's kernels need besides its λ, parameters and gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ....algebra.structures.sumkron import SUMKRON
from ....model.block import Block
from .strides import padded


class ProductBuffers(NamedTuple):
    """What Q's two products read and write besides u, padded with zeros (``row_layout.BlockFields``)."""

    terms: int
    S: Tensor
    P: Tensor
    XT: Tensor
    out: Tensor


class LambdaBuffers(NamedTuple):
    """Scratch of a λ step: u, uᵀ and w S."""

    U: Tensor
    UT: Tensor
    WS: Tensor


class PolarBuffers(NamedTuple):
    """What the iterations for a polar factor read and write (``row_layout.PolarFields``).

    The factor of nat (m, n) ends in the first, its transpose in the second.
    """

    polar: Tensor  # (m, np)
    polar_t: Tensor  # (n, mp)
    next_xt: Tensor  # as the transpose of X, the wide one of those two
    A: Tensor
    B: Tensor


class Scratch:
    """A block's memory by name, padded with zeros at first."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.more: dict[str, Tensor] = {}

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    def scratch(self, name: str, *shape: int) -> Tensor:
        """Zeroed at the first call, kept."""
        if name not in self.more:
            self.more[name] = self._zeros(*shape)
        return self.more[name]


class Workspace(Scratch):
    """A block's cached products and scratch, padded with zeros. ``version``: of the λ that S and P are of."""

    def __init__(self, block: Block) -> None:
        super().__init__(block.momentum.device)
        m, n = block.shape
        self.terms = len(block.structure.fishleg_aux) // 2 if block.structure.maths is SUMKRON else 1
        self.S = self._zeros(self.terms, n, padded(n))
        self.P = self._zeros(m, self.terms * padded(m))
        self.XT = self._zeros(n, self.terms * padded(m))
        self.out = self._zeros(m, padded(n))
        self.version: object = None
        self.products: dict[str, Tensor] | None = None  # P and S without padding, by the names that structures have

    def buffers(self, out: Tensor | None = None) -> ProductBuffers:
        """For Q's products; ``out`` for the result, instead of the workspace's."""
        return ProductBuffers(self.terms, self.S, self.P, self.XT, self.out if out is None else out)

    def lambda_buffers(self) -> LambdaBuffers:
        """For a λ step."""
        (n, mp), (m, np) = self.XT.shape, self.out.shape
        mp //= self.terms
        return LambdaBuffers(
            self.scratch("U", m, np), self.scratch("UT", n, mp), self.scratch("WS", self.terms, m, np)
        )  # fmt: skip
