"""Tables and schedules of tiles on the device.

They are found by what they are made from: what has not changed since an earlier step is not built or uploaded again.
Each stream has its own, so that none reads what another has yet to upload. What a CUDA graph captured is kept, on the
host as well, and never written to: for good, since torch does not tell when a graph goes.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from . import streams
from .staging import send

TABLES, SCHEDULES = 8 << 20, 64 << 20  # bytes of device tensors kept for what they are made from
Schedule = tuple[Tensor, int]  # (tiles, 4) int32 on the device, and how many tiles there are

_CODES = {torch.int64: "q", torch.int32: "i", torch.float32: "f"}  # of array.array


def sent(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device."""
    found = torch.empty_like(host, device=device)
    if host.numel():
        send(host, found)
    return found


class Uploads:
    """The latest used device tensors by what they are made from and by stream, as many as fit so many bytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._found: OrderedDict[tuple[int, Hashable], Tensor] = OrderedDict()
        self._lock = Lock()  # threads may step optimizers of their own

    def get(self, key: Hashable, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` makes on the host, on the device."""
        mine, captured = (streams.stream_of(device), key), device.type == "cuda" and streams.capturing()
        with self._lock:
            found = self._found.get(mine)
            if found is not None:
                self._found.move_to_end(mine)
            elif captured:  # which began by synchronising: any stream's is there
                found = next((t for (_, other), t in self._found.items() if other == key), None)
        if found is None:
            found = sent(make(), device)
            if not captured:  # memory of a graph's pool is that graph's
                self._put(mine, found)
        streams.keep(found)
        return found

    def _put(self, mine: tuple[int, Hashable], found: Tensor) -> None:
        with self._lock:
            before = self._found.pop(mine, None)
            self._found[mine] = found
            self._bytes += found.nbytes - (0 if before is None else before.nbytes)
            while self._bytes > self._limit and len(self._found) > 1:
                self._bytes -= self._found.popitem(last=False)[1].nbytes

    def __len__(self) -> int:
        return len(self._found)


_tables, _schedules = Uploads(TABLES), Uploads(SCHEDULES)


def upload(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A device tensor of these values: an earlier one where there is one."""
    raw = array(_CODES[dtype], values).tobytes()

    def make() -> Tensor:
        return torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype, device="cpu")

    return _tables.get((raw, dtype, device), device, make)


def upload_rows(rows: Iterable[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows of equal length, one after the other."""
    return upload([x for row in rows for x in row], dtype, device)


class Tiles(NamedTuple):
    """The (bm, bn) tiles of some matrices (row, m, n, extra): see ``tiles``."""

    shapes: tuple[tuple[int, int, int, int], ...]
    bm: int
    bn: int
    half: bool
    numbered: bool

    def total(self) -> int:
        """How many there are."""
        grids = [(-(-m // self.bm), -(-n // self.bn)) for _, m, n, _ in self.shapes]
        return sum(rows * (rows + 1) // 2 if self.half else rows * columns for rows, columns in grids)

    def entries(self) -> Tensor:
        """(row, i, j, extra) of each: (tiles, 4)."""
        found = []
        for row, m, n, extra in self.shapes:
            rows, columns = -(-m // self.bm), -(-n // self.bn)
            if self.half:
                ij = torch.tril_indices(rows, rows, device="cpu")
            else:
                ij = torch.cartesian_prod(*(torch.arange(k, device="cpu") for k in (rows, columns))).T
            last = torch.arange(ij.shape[1], device="cpu") + extra if self.numbered else torch.full_like(ij[0], extra)
            found.append(torch.stack([torch.full_like(last, row), *ij, last], dim=1))
        return torch.cat(found) if found else torch.empty(0, 4, dtype=torch.int64, device="cpu")


def tiles(
    shapes: Sequence[tuple[int, int, int, int]], bm: int, bn: int, half: bool = False, numbered: bool = False
) -> tuple[Tiles, ...]:
    """(row, i, j, extra) of every (bm, bn) tile of matrices (row, m, n, extra), to be scheduled.

    half: those with j ≤ i. numbered: extra counts on from one tile of a matrix to the next.
    """
    return (Tiles(tuple(shapes), bm, bn, half, numbered),)


def schedule(found: tuple[Tiles, ...], device: torch.device) -> Schedule:
    """What ``tiles`` gave, or several of those one after the other, on the device."""

    def make() -> Tensor:
        return torch.cat([some.entries() for some in found]).to(torch.int32)

    return _schedules.get((found, device), device, make), sum(some.total() for some in found)
