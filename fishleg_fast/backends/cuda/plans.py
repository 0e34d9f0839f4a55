"""Where gradients lie, and the extension's plans with their workspaces, as the ops point them to memory."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ...algebra.matrix import Matrix
from ...model.block import Block, advance
from ...model.gradients import GradientInPlace
from .coverage import ALIGNED, PRECISIONS, TYPES, UNCOVERED, BlockFacts
from .runtime import runtime


class Op(IntEnum):
    """As csrc/cuda/host/plan.h numbers them."""

    THETA = 0
    LAMBDA = 1
    QV = 2
    REFRESH = 3


class GradientViews:
    """Where a block's gradient is: a pointer, strides over the part's shape and a type for each part, and a factor."""

    __slots__ = ("held", "layouts", "pointers")

    def __init__(self, block: Block, facts: BlockFacts, u: Matrix) -> None:
        self.held: list[Tensor] = []  # temporary tensors that the pointers are of
        self.pointers: list[int] = []  # g and the factor of each part; 0: zeros, no factor
        self.layouts: list[tuple[tuple[int, ...], int]] = []
        if isinstance(u, GradientInPlace):
            scale = 0
            if u.scale is not None:
                scale = self._hold(u.scale.to(block.momentum.device, torch.float32)).data_ptr()
            for grad, shape in zip(u.block.grads, facts.shapes, strict=True):
                if grad is None:
                    self.pointers += (0, 0)
                    self.layouts.append(((0,) * len(shape), 0))
                else:
                    self.pointers += (grad.data_ptr(), scale)
                    self.layouts.append((grad.stride(), TYPES[grad.dtype]))
            return
        assert isinstance(u, Tensor)
        whole = self._hold(u if u.dtype in TYPES else u.float())
        start, size, kind = whole.data_ptr(), whole.element_size(), TYPES[whole.dtype]
        outer, along = whole.stride()
        for shape, offset in zip(facts.shapes, facts.offsets, strict=False):
            strides, run = [], along if block.axis else outer
            for d in range(len(shape) - 1, -1, -1):
                strides.append(outer if block.axis and d == 0 else run)
                run *= shape[d]
            self.layouts.append((tuple(reversed(strides)), kind))
            self.pointers += (start + offset * size * (along if block.axis else outer), 0)

    def _hold(self, t: Tensor) -> Tensor:
        self.held.append(t)
        return t


class Plan:
    """One of the extension's plans with its workspace, and what it is pointed to for the op under way."""

    def __init__(self, compiled: Any, count: int, uncovered: int, device: torch.device) -> None:
        self.native, self.device = compiled, device
        self.workspace = torch.empty(max(compiled.workspace_bytes, 1), dtype=torch.uint8, device=device)
        self.external = self._doubles(compiled.external, 3 * uncovered).view(uncovered, 3)
        self.external_2 = self._doubles(compiled.external_2, 3 * uncovered).view(uncovered, 3)
        self.external_2.zero_()
        self.scales = self._doubles(compiled.scales, count)
        self.captured = False
        self.facts: list[BlockFacts] = []
        self.begin()

    def _doubles(self, offset: int, count: int) -> Tensor:
        return self.workspace[offset : offset + 8 * count].view(torch.float64)

    def polar(self, k: int, shape: tuple[int, int]) -> Tensor:
        """Block k's nat/‖nat‖ before, and nat's polar factor after, a θ step that takes it: a view, (m, n)."""
        (m, n), start = shape, self.native.polar(k)
        ld = -(-n // ALIGNED) * ALIGNED
        return self.workspace[start : start + 4 * m * ld].view(torch.float32).view(m, ld)[:, :n]

    def begin(self) -> None:
        """Forget what the last op was pointed to."""
        self.pointers: list[int] = []
        self.numbers: list[float] = []
        self.held: list[Any] = []
        self.stream = runtime().stream(self.device)

    def point(self, *tensors: Tensor | None) -> None:
        """Append where tensors are; 0 for None."""
        for t in tensors:
            self.pointers.append(0 if t is None else t.data_ptr())

    def take(self, views: GradientViews) -> None:
        """Append where a gradient is."""
        self.held.append(views)
        self.pointers += views.pointers

    def hold(self, t: Tensor) -> Tensor:
        """Keep a temporary tensor until the op has been launched."""
        self.held.append(t)
        return t

    def count(self, covered: Sequence[Tensor], uncovered: Sequence[Tensor], ok: Tensor, on_device: bool) -> None:
        """Advance the blocks' counters where the kernels have not: those of covered ones that are not on the device, or
        all unless ``on_device``.
        """
        mine = [t for t in covered if not on_device or t.device != self.device]
        advance([*mine, *uncovered], ok)

    @property
    def lists(self) -> tuple[array[int], array[float]]:
        """Pointers and numbers as the extension takes them."""
        return array("q", self.pointers), array("d", self.numbers)


def described(op: Op, block: Block, facts: BlockFacts, view: GradientViews | None, flat: bool) -> tuple:
    """A block as csrc/bindings/cuda.cpp takes it. ``flat``: nat gives way to its polar factor."""
    precision = PRECISIONS[block.structure.precision]
    if op is Op.REFRESH:
        return block.name, facts.kind, precision, *block.shape, block.axis, (), False
    if view is None:
        return block.name, UNCOVERED, precision, *block.shape, block.axis, (), flat
    parts = [
        (shape, strides, layout[0], kind, layout[1], offset)
        for (shape, strides, kind), layout, offset in zip(facts.layout, view.layouts, facts.offsets, strict=False)
    ]
    return block.name, facts.kind, precision, *block.shape, block.axis, parts, flat
