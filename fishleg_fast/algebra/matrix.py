"""What ops take for a matrix (m, n): a tensor, a product of low rank, or one put together only where it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .low_rank import DenseAndLowRank, LowRank


def widest(device: torch.device) -> torch.dtype:
    """float64, which Apple's GPUs do not have."""
    return torch.float32 if device.type == "mps" else torch.float64


class Deferred(Protocol):
    """A matrix that lies elsewhere, in pieces say, until its entries are wanted together."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)"""

    @property
    def dense(self) -> Tensor:
        """(m, n). Not to be written to."""

    def scaled(self, c: Tensor) -> Deferred:
        """c times this."""


Matrix = Tensor | LowRank | Deferred


def dense(x: Matrix | DenseAndLowRank) -> Tensor:
    """(m, n)"""
    return x if isinstance(x, Tensor) else x.dense


def dot(x: Matrix, y: Matrix) -> Tensor:
    """⟨x, y⟩, a scalar."""
    if isinstance(x, LowRank) and x is y and x.square is not None:
        return x.E.new_tensor(x.square)
    if isinstance(x, LowRank) and isinstance(y, LowRank):
        y = y.to(x.E.dtype)  # v and F v can be of another dtype than u
        return torch.sum((x.E @ y.E.T) * (x.H @ y.H.T))
    if isinstance(x, LowRank):
        y = dense(y)
        x = x.to(y.dtype)
        return torch.sum(x.E * (x.H @ y.T))
    if x is y:  # torch's dot products do not use all threads
        whole = dense(x)
        wide = torch.float64 if whole.dtype == torch.float64 else torch.float32
        return torch.linalg.vector_norm(whole, dtype=wide).square()
    return torch.dot(dense(x).reshape(-1), dense(y).reshape(-1))


def norm_of(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """That of all together, as wide as their devices have it: a scalar on ``device``."""
    norms = [torch.linalg.vector_norm(t, dtype=widest(t.device)).to(device) for t in tensors]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=device)


def is_zero(x: Tensor) -> Tensor:
    """Whether all entries are zero: a boolean scalar."""
    if not x.numel():
        return torch.ones((), dtype=torch.bool, device=x.device)
    least, most = torch.aminmax(x)  # any() takes six times as long on a CPU
    return (least == 0) & (most == 0)
