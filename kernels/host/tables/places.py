"""Where tensors are and how they lie, of a whole list at once: by the extension, which is quicker, or by torch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache
from itertools import chain
from operator import attrgetter, is_
from types import ModuleType
from typing import Any

from torch import Tensor

from ....native import available, extension

_dtype, _device = attrgetter("dtype"), attrgetter("device")


@cache
def _extension() -> ModuleType | None:
    """None without it."""
    return extension() if available().supported else None


def places(tensors: Sequence[Tensor]) -> tuple[list[int], Hashable]:
    """(addresses, what is equal where strides, dtypes and devices are)."""
    native = _extension()
    found = None if native is None else native.tensor_places(list(tensors))
    return by_torch(tensors) if found is None else found


def flattened(objects: list[Any], attribute: str) -> list[Any]:
    """All that is in an attribute of each object, a list or a dict's values."""
    native = _extension()
    if native is not None:
        return native.flattened(objects, attribute)
    found = (getattr(x, attribute) for x in objects)
    return list(chain.from_iterable(x.values() if isinstance(x, dict) else x for x in found))


class Versions:
    """Tensors' counters of what was written to them."""

    def __init__(self) -> None:
        native = _extension()
        self._native = None if native is None else native.Versions()
        self._kept: list[int] | None = None

    def moved(self, tensors: list[Tensor]) -> bool:
        """Whether any differs from what it was at the latest call, or this is the first."""
        if self._native is not None:
            return self._native.moved(tensors)
        before, self._kept = self._kept, [t._version for t in tensors]
        return before != self._kept


def objects(blocks: list[Any], learning: bool) -> list[Any]:
    """What plans depend on of blocks, but for where it is: objects that are to be the same, by identity.

    learning: of a step of λ too.
    """
    native = _extension()
    return objects_by_python(blocks, learning) if native is None else native.objects(blocks, learning)


def has_objects(blocks: list[Any], learning: bool, known: list[Any]) -> bool:
    """Whether these are the very objects of such a list. Tensors are not to be compared by ==."""
    native = _extension()
    if native is not None:
        return native.has_objects(blocks, learning, known)
    found = objects_by_python(blocks, learning)
    return len(found) == len(known) and all(map(is_, found, known))


def objects_by_python(blocks: list[Any], learning: bool) -> list[Any]:
    """The same without the extension."""
    found: list[Any] = []
    for block in blocks:
        structure = block.structure
        aux = structure.fishleg_aux  # λ's own dict too: of its tensors there may be others
        found += [structure, block.momentum, block.step, block.spectral, structure.precision]
        found += [*block.groups, *block.params, aux, *aux.values()]
        if learning:  # Adam's moments and counters, which rows point to as they do to λ
            found += [*block.exp_avg.values(), *block.exp_avg_sq.values(), block.aux_step]
    return found


def by_torch(tensors: Sequence[Tensor]) -> tuple[list[int], Hashable]:
    """The same without the extension."""
    lie = tuple(map(Tensor.stride, tensors)), tuple(map(_dtype, tensors)), tuple(map(_device, tensors))
    return list(map(Tensor.data_ptr, tensors)), lie
