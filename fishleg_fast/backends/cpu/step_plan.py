"""The C++ plan of a list of blocks: made once, and told in each step what has moved (csrc/cpu/step/step_plan.h).

As long as parameters stay where they are, and gradients are matrices in memory of the type they had, a step hands over
the gradients' addresses. Anything else, a gradient in another layout for one, is described anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ... import native
from ...algebra.low_rank import LowRank
from ...algebra.matrix import Matrix
from ...algebra.structures.diagonal import Diagonal
from ...model.block import Block
from ...model.gradients import GradientInPlace
from ..reference.products import common_dtype


class Source(IntEnum):
    """What a block's natural gradient is made of, as csrc/cpu/step/table.h numbers them."""

    PRODUCT = 0
    LOW_RANK = 1
    DIAGONAL = 2
    AFTER = 3
    AFTER_DIAGONAL = 4


CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # Dtype of csrc/cpu/step/table.h

View = tuple[int, int, int, int]  # address, row stride, column stride, dtype
_NOWHERE: View = (0, 0, 0, 0)
_NOTHING = torch.empty(0, device="cpu")  # in the place of a gradient that is None

_grads: Callable[[Block], list[Tensor | None]] = attrgetter("grads")
dtype_of: Callable[[Tensor], torch.dtype] = attrgetter("dtype")


def _view(t: Tensor) -> View:
    return t.data_ptr(), t.stride(0), t.stride(1), CODES[t.dtype]


class StepPlan:
    """``native`` is the C++ one. ``formed``: the indices of blocks with products of matrices in Q."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = list(blocks)
        self.params = [part.param for block in blocks for part in block.parts]
        self.formed = [k for k, block in enumerate(blocks) if type(block.structure) is not Diagonal]
        self._shapes: list[tuple[int, int, list[int]]] = []
        for block in blocks:
            m, n = block.shape
            sizes = [part.of(part.param).numel() for part in block.parts]
            self._shapes.append((m, n, [k // m for k in sizes]) if block.axis else (1, m, sizes))
        self.dtype = common_dtype(blocks)
        self.moved: list[Any] = self.params  # those that have a gradient
        names = [(block.name, CODES[block.dtype]) for block in blocks]
        self.native = native.extension().StepPlan([n + s for n, s in zip(names, self._shapes, strict=True)])
        self._diagonals = [b.structure.fishleg_aux["d"] if type(b.structure) is Diagonal else None for b in blocks]
        state = [t for block in blocks for t in (block.momentum, block.step)]
        self._kept: list[Any] = [t.untyped_storage() for t in (*state, *self._diagonals) if t is not None]
        self._copied: list[Any] = []  # what the addresses of this step need
        self._back: list[tuple[Tensor, Tensor]] = []  # parameters, and their copies that the plan writes to
        self._layouts: Any = None
        self._groups: Any = None  # kept, so that the ids in the next are theirs alone
        self._known: Any = None
        self._rates: Any = None
        self._mode: Any = None

    def place(self, gs: Sequence[Matrix]) -> None:
        """Tell the plan where parameters and gradients are."""
        grads: list[Any] = [*chain.from_iterable(map(_grads, self.blocks))]
        self.moved = self.params
        try:
            addresses = [*map(Tensor.data_ptr, grads)]
        except TypeError:  # some are None; looking for those first would take as long as all the rest
            self.moved = [p for p, grad in zip(self.params, grads, strict=True) if grad is not None]
            grads = [_NOTHING if grad is None else grad for grad in grads]
            addresses = [*map(Tensor.data_ptr, grads)]
        params = [*map(Tensor.data_ptr, self.params)]
        plain = all(map(Tensor.is_contiguous, grads)) and {GradientInPlace, LowRank}.issuperset(map(type, gs))
        missing = len(self.moved) < len(params) and [*map(id, self.moved)]
        layouts = (params, [*map(dtype_of, grads)], missing) if plain else None
        if layouts is not None and layouts == self._layouts:
            self.native.point(addresses)
            return
        self._layouts = layouts
        self._copied, self._back = [], []
        for k, (block, g) in enumerate(zip(self.blocks, gs, strict=True)):
            d = self._diagonals[k]
            pieces = self._pieces(k, block, g)
            address = 0 if d is None else d.data_ptr()
            self.native.place(k, block.momentum.data_ptr(), block.step.data_ptr(), address, pieces)
        if self._back:  # copies are of this step alone
            self._layouts = None

    def _pieces(self, k: int, block: Block, g: Matrix) -> list[tuple[View, View, bool]]:
        """(parameter, gradient, whether it moves) of each part."""
        rows, _, widths = self._shapes[k]
        pieces: list[tuple[View, View, bool]] = []
        first = 0
        for part, grad, width in zip(block.parts, block.grads, widths, strict=True):
            own = part.of(part.param.detach())
            param = own.reshape(rows, width)
            if param.data_ptr() != own.data_ptr():
                self._back.append((own, param))
            source: Tensor | None = grad
            if isinstance(g, Tensor):  # (m, n), or (m, 1) of parts below each other
                source = g[:, first : first + width] if block.axis else g[first : first + width].T
            taken = None if source is None else source.reshape(rows, width)
            self._copied += [param, taken]
            pieces.append((_view(param), _NOWHERE if taken is None else _view(taken), grad is not None))
            first += width
        return pieces

    def bring_back(self) -> None:
        """Write to parameters what the plan wrote to copies of them."""
        for param, copy in self._back:
            param.copy_(copy.reshape(param.shape))

    def set_rates(self) -> None:
        """lr, weight decay, momentum and lr before any schedule, where they have changed."""
        lists = [block.groups for block in self.blocks]
        known = [*map(id, lists)]
        if known != self._known:
            self._known, self._groups, self._rates = known, lists, None
            self._distinct = list({id(group): group for groups in lists for group in groups}.values())
        distinct = [
            (float(group["lr"]), group["weight_decay"], group["beta"], group["base_lr"]) for group in self._distinct
        ]
        if distinct != self._rates:
            self._rates = distinct
            of = {id(group): values for group, values in zip(self._distinct, distinct, strict=True)}
            pieces = [of[id(group)] for groups in lists for group in groups]
            firsts = [of[id(groups[0])] for groups in lists]
            self.native.set_rates(
                [p[0] for p in pieces], [p[1] for p in pieces], [f[2] for f in firsts], [f[3] for f in firsts]
            )

    def set_mode(self, diagonal_source: Source) -> None:
        """How the natural gradients of diagonal blocks come about; the others are told in every step."""
        if diagonal_source != self._mode:
            self._mode = diagonal_source
            for k, d in enumerate(self._diagonals):
                if d is not None:
                    self.native.give(k, diagonal_source, 0, 0)

    def forget_mode(self) -> None:
        """Diagonal blocks were told otherwise in this step."""
        self._mode = None
