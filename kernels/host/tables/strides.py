"""How tensors lie in memory: our own with padding, and those that others laid out, whose columns two strides tell."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

ROUND = 16  # leading dimensions of our own matrices are multiples of this many elements


def padded(k: int) -> int:
    """k rounded up to ROUND."""
    return -(-k // ROUND) * ROUND


def is_padded(t: Tensor) -> bool:
    """Whether rows of (m, n) begin at multiples of ROUND elements, so that there is padding to read."""
    return t.shape[1] > 1 and t.stride(0) % ROUND == 0 and t.stride(0) >= padded(t.shape[1]) and t.data_ptr() % 16 == 0


class Columns(NamedTuple):
    """Where column c of a tensor seen as (rows, columns) is: (c // inner)·outer + (c % inner)·step, plus row·r."""

    row: int
    inner: int
    outer: int
    step: int

    @property
    def plain(self) -> bool:
        """Whether columns lie next to each other."""
        return self.step == 1 and self.outer == self.inner


def _merged(sizes: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(size, stride) of dimensions, those that count through memory as one merged; of ones, nothing."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


@lru_cache(maxsize=4096)
def _columns(shape: torch.Size, strides: tuple[int, ...], vector: bool) -> Columns | None:
    if vector:
        row, sizes, steps = 0, shape, strides
    else:
        row, sizes, steps = strides[0], shape[1:], strides[1:]
    dims = _merged(sizes, steps)
    if len(dims) > 2:
        return None
    if len(dims) == 2:
        (_, outer), (inner, step) = dims
        return Columns(row, inner, outer, step)
    size, step = dims[0] if dims else (1, 1)
    return Columns(row, size, size, 1) if step == 1 else Columns(row, 1, step, 0)


def columns(t: Tensor, vector: bool = False) -> Columns | None:
    """Strides of (m, ...) seen as (m, numel/m), or as a single row with ``vector``; None where two do not tell."""
    return _columns(t.shape, t.stride(), vector)


def with_columns(t: Tensor, vector: bool = False) -> tuple[Tensor, Columns]:
    """The tensor and its strides; a contiguous copy where two do not tell."""
    found = columns(t, vector)
    if found is None:
        t = t.contiguous()
        found = columns(t, vector)
    assert found is not None
    return t, found


def scattered(tensors: Sequence[Tensor]) -> bool:
    """Whether any tensor (m, ...) has columns that do not lie next to each other."""
    return any(t.ndim > 1 and t.shape[0] < t.numel() and not with_columns(t)[1].plain for t in tensors)
