"""Where tensors are and how they lie, of a whole list at once: by the extension, which is quicker, or by torch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from operator import attrgetter

from torch import Tensor

from ....native import available, extension

_dtype, _device = attrgetter("dtype"), attrgetter("device")


@cache
def _reader() -> Callable[[list[Tensor]], tuple[list[int], bytes] | None] | None:
    """The extension's; None without it."""
    return extension().tensor_places if available().supported else None


def places(tensors: Sequence[Tensor]) -> tuple[list[int], Hashable]:
    """(addresses, what is equal where strides, dtypes and devices are)."""
    reader = _reader()
    found = None if reader is None else reader(list(tensors))
    return by_torch(tensors) if found is None else found


def by_torch(tensors: Sequence[Tensor]) -> tuple[list[int], Hashable]:
    """The same without the extension."""
    lie = tuple(map(Tensor.stride, tensors)), tuple(map(_dtype, tensors)), tuple(map(_device, tensors))
    return list(map(Tensor.data_ptr, tensors)), lie
