"""The matrices that a step gives its blocks, as the kernels read them: where they are, whatever form they have.

What is looked at at every step is looked at for all blocks together, since host work is counted in microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import attrgetter, or_

import torch
from torch import Tensor

from ....algebra.matrix import Matrix, dense
from ....model.block import Block
from ....model.gradients import GradientInPlace
from ..launch import DTYPES
from .places import flattened, places
from .step_table import Sources, Told
from .strides import columns, with_columns

_scale = attrgetter("scale")


def unaligned(addresses: Sequence[int]) -> list[int]:
    """The numbers of those that are not multiples of 16 bytes."""
    return [k for k, at in enumerate(addresses) if at & 15] if reduce(or_, addresses, 0) & 15 else []


def _in_place(g: Matrix, scaled: bool) -> bool:
    """Whether ``block.grads`` hold it, as they do matrices of low rank."""
    return not isinstance(g, Tensor) and (scaled or getattr(g, "scale", None) is None)


class Given:
    """One matrix a block, of a step: gradients, or vectors of their form.

    tensors: (m, n) of matrices that are tensors; of others, which ``block.grads`` hold, gradients where autograd left
        them.
    scaled: whether the kernels multiply by ``GradientInPlace.scale``.
    """

    def __init__(self, matrices: Sequence[Matrix], blocks: Sequence[Block], scaled: bool = False) -> None:
        found = flattened(list(blocks), "grads")
        self._missing = [g is None for g in found] if type(None) in set(map(type, found)) else None
        plain = set(map(type, matrices)) == {GradientInPlace} and (scaled or set(map(_scale, matrices)) == {None})
        self._whole = None if plain else [not _in_place(g, scaled) for g in matrices]
        self.tensors: list[Tensor] = []
        if self._whole is not None and any(self._whole):
            for g, block, whole in zip(matrices, blocks, self._whole, strict=True):
                self.tensors += [dense(g)] if whole else [t for t in block.grads if t is not None]
        else:
            self.tensors = [g for g in found if g is not None] if self._missing else found
        self.addresses, self._lie = places(self.tensors)

    def in_place(self, index: int) -> bool:
        """Whether a block's are gradients of its parts."""
        return self._whole is None or not self._whole[index]

    def facts(self) -> tuple:
        """What has to be as it was for what ``Layouts`` found to hold."""
        return self._whole, self._missing, self._lie, unaligned(self.addresses)


class Layouts:
    """How the tensors of a ``Given`` lie, for the steps whose facts are the same.

    dtypes: of each block's, as they are read. What lies otherwise than the kernels read is copied at every step.
    """

    def __init__(self, blocks: Sequence[Block], given: Given) -> None:
        self._copies: dict[int, tuple[torch.dtype, bool]] = {}  # by number: dtype, and whether it is seen as a row
        self._first: list[int] = []  # each block's first tensor
        self.dtypes: list[torch.dtype] = []
        at = 0
        for index, block in enumerate(blocks):
            in_place = given.in_place(index)
            count = sum(g is not None for g in block.grads) if in_place else 1
            mine = given.tensors[at : at + count]
            dtype = next((t.dtype for t in mine), torch.float32)
            dtype = dtype if dtype in DTYPES else torch.float32
            for number, t in enumerate(mine, at):
                vector = block.axis == 0 and in_place
                if t.dtype != dtype or columns(t, vector) is None:
                    self._copies[number] = dtype, vector
            self._first.append(at)
            self.dtypes.append(dtype)
            at += count

    def readable(self, given: Given) -> list[Tensor]:
        """The tensors, copies in the place of those that the kernels do not read."""
        if not self._copies:
            return given.tensors
        found = list(given.tensors)
        for number, (dtype, vector) in self._copies.items():
            found[number] = with_columns(found[number].to(dtype), vector)[0]
        return found

    def parts(
        self, index: int, block: Block, given: Given, tensors: Sequence[Tensor], sources: Sources
    ) -> list[Told | None]:
        """A block's, one a part; ``tensors``: those that are ``readable``, which come first among the step's."""
        at = self._first[index]
        if given.in_place(index):
            mine = iter(range(at, len(tensors)))
            return [None if g is None else sources.step(k := next(mine), tensors[k]) for g in block.grads]
        whole = tensors[at]
        sizes = [part.of(part.param).numel() // (block.shape[0] if block.axis else 1) for part in block.parts]
        pieces = whole.split(sizes, dim=block.axis)
        views = [s.select(1, 0) if block.axis == 0 or k else s for k, s in enumerate(pieces)]
        return [sources.step(at, whole, view) for view in views]


class Scales:
    """The device scalars that multiply the matrices of a step, for ``Given`` with ``scaled``; some have none."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        if set(map(type, matrices)) == {GradientInPlace}:
            self._all = list(map(_scale, matrices))
        else:
            self._all = [g.scale if type(g) is GradientInPlace else None for g in matrices]
        self._there = [s for s in self._all if s is not None]

    def __len__(self) -> int:
        return len(self._there)

    def facts(self) -> list[bool]:
        """What has to be as it was for numbers to hold."""
        return [s is None for s in self._all]

    def readable(self, device: torch.device) -> list[Tensor]:
        """Those that there are, in float32 on the device."""
        distinct = {id(s): s for s in self._there}
        if len(distinct) == len(self._there):
            return [s.to(device, torch.float32) for s in self._there]
        found = {key: s.to(device, torch.float32) for key, s in distinct.items()}
        return [found[id(s)] for s in self._there]

    def told(self, index: int, before: int, sources: Sources) -> Told | None:
        """A block's; ``before``: how many tensors of the step come before all scales."""
        s = self._all[index]
        return None if s is None else sources.step(before + sum(x is not None for x in self._all[:index]), s)
