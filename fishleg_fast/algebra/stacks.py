"""Tensors of one shape as one, with a dimension in front: one operation does for all of them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

ENTRIES = 2**22  # of tensors put together at a time: where these are larger, a launch more costs nothing

Key = TypeVar("Key", bound=Hashable)


def together(tensors: Sequence[Tensor]) -> Tensor:
    """(count, *shape): a view where they lie at equal distances in one memory, as what ``unbind`` gave; or a copy."""
    first = tensors[0]
    if len(tensors) == 1:
        return first[None]
    step = _distance(tensors)
    if step is None:
        return torch.stack(list(tensors))
    return first.as_strided((len(tensors), *first.shape), (step, *first.stride()), first.storage_offset())


def _distance(tensors: Sequence[Tensor]) -> int | None:
    """From one tensor to the next, in entries of the memory that they share; None where there is none."""
    first, base = tensors[0], tensors[0]._base
    if base is None:
        return None
    start, stride, shape = first.storage_offset(), first.stride(), first.shape
    step = int(tensors[1].storage_offset() - start)
    if step <= 0:
        return None
    for k, t in enumerate(tensors):
        if t._base is not base or t.storage_offset() != start + k * step or t.stride() != stride or t.shape != shape:
            return None
    return step


def scalars(values: Sequence[Tensor]) -> Tensor:
    """Scalars of whatever dtype and device as one vector on the first one's device, float64 where any is."""
    wide = torch.float64 if any(v.dtype == torch.float64 for v in values) else torch.float32
    return together([v.to(values[0].device, wide) for v in values])


def alike(keys: Sequence[Key | None], entries: Sequence[int]) -> list[list[int]]:
    """Numbers of what has equal keys and no more than ENTRIES together, in order; each None by itself."""
    found: list[list[int]] = []
    latest: dict[Key, tuple[list[int], int]] = {}  # those that there is room for
    for number, (key, count) in enumerate(zip(keys, entries, strict=True)):
        if key is None:
            found.append([number])
            continue
        members, total = latest.get(key, ([], ENTRIES + 1))
        if total + count > ENTRIES:
            members, total = [], 0
            found.append(members)
        members.append(number)
        latest[key] = members, total + count
    return found
