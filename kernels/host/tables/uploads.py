"""Tables and schedules of tiles on the device.

They are found by their contents: what has not changed since an earlier step is not built or uploaded again. What a CUDA
graph captured is kept, on the host as well, and never written to.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

KEPT = 512  # device tensors kept for their contents
Schedule = tuple[Tensor, int]  # (tiles, 4) int32 on the device, and how many tiles there are

_uploaded: OrderedDict[tuple, Tensor] = OrderedDict()
_captured: list[object] = []


def capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def keep(*used: object) -> None:
    """Keep for good what a CUDA graph that is being captured will read and write."""
    if capturing():
        _captured.append(used)


def upload(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A device tensor of these values: an earlier one where there is one."""
    key = (values, dtype, device)
    found = _uploaded.get(key)
    host = found
    if found is None:
        host = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
        found = host.to(device, non_blocking=True)
        if not capturing():  # memory of a graph's pool is that graph's
            _uploaded[key] = found
            if len(_uploaded) > KEPT:
                _uploaded.popitem(last=False)
    else:
        _uploaded.move_to_end(key)
    keep(host, found)
    return found


def upload_rows(rows: Iterable[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows of equal length, one after the other."""
    return upload(tuple(x for row in rows for x in row), dtype, device)


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
    return torch.tensor(entries, dtype=torch.int32, device="cpu").reshape(-1, 4).to(device)


def schedule(entries: tuple, device: torch.device) -> Schedule:
    """Entries of ``tiles`` on the device."""
    found = _schedule(entries, device)
    keep(found)
    return found, len(entries)
