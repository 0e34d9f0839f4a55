"""Rows that describe blocks to the kernels, schedules of tiles, and the workspace that each block's kernels need.

Rows and schedules are device tensors found by their contents: what has not changed since an earlier step is not built
or uploaded again. What a CUDA graph captured is kept, on the host as well, and never written to.
"""

from __future__ import annotations

import struct
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..blocks import Block
from ..reference.products import MATHS

KEPT = 512  # device tensors kept for their contents
ROUND = 16  # leading dimensions are multiples of this many elements

_uploaded: OrderedDict[tuple, Tensor] = OrderedDict()
_captured: list[object] = []


def capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def keep(*used: object) -> None:
    """Keep for good what a CUDA graph that is being captured will read and write."""
    if capturing():
        _captured.append(used)


def padded(k: int) -> int:
    """k rounded up to ROUND."""
    return -(-k // ROUND) * ROUND


def upload(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A device tensor of these values: an earlier one where there is one."""
    key = (values, dtype, device)
    found = _uploaded.get(key)
    host = found
    if found is None:
        host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
        found = host.to(device, non_blocking=True)
        if not capturing():  # memory of a graph's pool is that graph's
            _uploaded[key] = found
            if len(_uploaded) > KEPT:
                _uploaded.popitem(last=False)
    else:
        _uploaded.move_to_end(key)
    keep(host, found)
    return found


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


class Workspace:
    """A block's cached products and scratch, padded with zeros. ``version``: of the λ that S and P are of."""

    def __init__(self, block: Block) -> None:
        m, n = block.shape
        self.terms = len(block.structure.fishleg_aux) // 2 if block.structure.maths is MATHS["sumkron"] else 1
        options = {"dtype": torch.float32, "device": block.momentum.device}
        self.zeros = lambda *shape: torch.zeros(shape, **options)
        self.S = self.zeros(self.terms, n, padded(n))
        self.P = self.zeros(m, self.terms * padded(m))
        self.XT = self.zeros(n, self.terms * padded(m))
        self.out = self.zeros(m, padded(n))
        self.version: object = None
        self.more: dict[str, Tensor] = {}  # what only some ops need

    def scratch(self, name: str, *shape: int) -> Tensor:
        """Zeroed at the first call, kept."""
        if name not in self.more:
            self.more[name] = self.zeros(*shape)
        return self.more[name]


class Memory(NamedTuple):
    """What products need of a ``Workspace``, elsewhere."""

    terms: int
    S: Tensor
    P: Tensor
    XT: Tensor
    out: Tensor


_workspaces: weakref.WeakKeyDictionary[Block, Workspace] = weakref.WeakKeyDictionary()


def workspace(block: Block) -> Workspace:
    """The block's, made at the first call."""
    found = _workspaces.get(block)
    if found is None or found.S.device != block.momentum.device:
        found = _workspaces[block] = Workspace(block)
    return found


def is_padded(t: Tensor) -> bool:
    """Whether rows of (m, n) begin at multiples of ROUND elements, so that there is padding to read."""
    return t.shape[1] > 1 and t.stride(0) % ROUND == 0 and t.stride(0) >= padded(t.shape[1]) and t.data_ptr() % 16 == 0


def bits(x: float) -> int:
    """A float32 as an int."""
    return struct.unpack("i", struct.pack("f", x))[0]


@lru_cache(maxsize=256)
def _tiles(shapes: tuple, bm: int, bn: int, half: bool, numbered: bool) -> tuple[tuple[int, ...], ...]:
    entries: list[tuple[int, ...]] = []
    for row, m, n, extra in shapes:
        start = len(entries)
        for i in range(-(-m // bm)):
            entries += [(row, i, j, extra) for j in range(i + 1 if half else -(-n // bn))]
        if numbered:
            entries[start:] = [(*e[:3], extra + k) for k, e in enumerate(entries[start:])]
    return tuple(entries)


def tiles(
    shapes: Sequence[tuple[int, int, int, int]], bm: int, bn: int, half: bool = False, numbered: bool = False
) -> tuple:
    """(row, i, j, extra) of every (bm, bn) tile of matrices (row, m, n, extra).

    half: those with j ≤ i. numbered: extra counts on from one tile of a matrix to the next.
    """
    return _tiles(tuple(shapes), bm, bn, half, numbered)


@lru_cache(maxsize=256)
def _schedule(entries: tuple, device: torch.device) -> Tensor:
    return torch.tensor(entries, dtype=torch.int32).reshape(-1, 4).to(device)


def schedule(entries: tuple, device: torch.device) -> tuple[Tensor, int]:
    """(tiles, 4) int32 on the device, and how many there are."""
    found = _schedule(entries, device)
    keep(found)
    return found, len(entries)
