"""The extension's plans with their workspaces, and what they are for."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ...model.block import Block, advance
from .coverage import ALIGNED, PRECISIONS, UNCOVERED, BlockFacts
from .gradients import BlockGradient
from .runtime import runtime


class Op(IntEnum):
    """As csrc/cuda/host/plan.h numbers them."""

    THETA = 0
    LAMBDA = 1
    QV = 2
    REFRESH = 3


class Watch:
    """Blocks with the λ and the settings that they had, to tell whether these are still theirs."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._extension = runtime().extension
        self._blocks = [weakref.ref(b) for b in blocks]  # which they keep alive, not the other way round
        self._lambdas, self._settings = self._found(blocks)
        self._versions = self._extension.Versions()

    def _found(self, blocks: Sequence[Block]) -> tuple[list[Tensor], list[Any]]:
        structures = [b.structure for b in blocks]
        settings = [s.precision for s in structures] + [s.operand_dtype for s in structures]
        return self._extension.flattened(structures, "fishleg_aux"), settings

    def same(self, blocks: Sequence[Block]) -> bool:
        """Whether these are the blocks, with the same tensors of λ and settings of products."""
        identical = self._extension.identical
        if not identical([ref() for ref in self._blocks], list(blocks)):
            return False
        lambdas, settings = self._found(blocks)
        return identical(lambdas, self._lambdas) and settings == self._settings

    def moved(self) -> bool:
        """Whether λ has been written to since this was last asked."""
        return self._versions.moved(self._lambdas)

    def forget(self) -> None:
        """λ counts as written to."""
        self._versions.forget()


class Rates:
    """Which parameter group each block and part is in, and what the groups say now."""

    def __init__(self) -> None:
        self._groups: list[dict[str, Any] | None] = []
        self._distinct: list[tuple[dict[str, Any], bool]] = []
        self.of_block = self.of_part = array("q")

    def numbers(
        self, blocks: Sequence[Block], covered: Sequence[bool], device: torch.device
    ) -> tuple[list[tuple[float, float, float, float]], list[Tensor | None]]:
        """(β, lr₀, lr, weight decay) of each group, and lr where it is on the device.

        lr₀ of blocks that are not covered is 1: their sums contain it.
        """
        extension = runtime().extension
        groups = extension.flattened(list(blocks), "groups")
        if not extension.identical(groups, self._groups):
            self._assign(blocks, covered, groups)
        numbers, rates = [], []
        for group, ours in self._distinct:
            lr = group["lr"]
            on_device = isinstance(lr, Tensor) and lr.device == device
            rates.append(lr.float().reshape(()) if on_device else None)
            numbers.append(
                (group["beta"], group["base_lr"] if ours else 1.0, 0.0 if on_device else lr, group["weight_decay"])
            )
        return [tuple(map(float, four)) for four in numbers], rates  # type: ignore[misc]

    def _assign(self, blocks: Sequence[Block], covered: Sequence[bool], groups: list[dict[str, Any] | None]) -> None:
        places: dict[tuple[int, bool], int] = {}
        self._groups, self._distinct, self.of_block, self.of_part = groups, [], array("q"), array("q")
        for block, ours in zip(blocks, covered, strict=True):
            found = []
            for group in block.groups:
                if (id(group), ours) not in places:
                    places[id(group), ours] = len(self._distinct)
                    self._distinct.append((group, ours))
                found.append(places[id(group), ours])
            self.of_block.append(found[0])
            self.of_part.extend(found if ours else ())


class Plan:
    """One of the extension's plans with its workspace, for blocks that lie as ``facts`` and ``covered`` tell."""

    def __init__(
        self,
        compiled: Any,
        blocks: Sequence[Block],
        facts: Sequence[BlockFacts],
        covered: Sequence[bool],
        device: torch.device,
    ) -> None:
        self.native, self.device = compiled, device
        self.facts, self.covered = list(facts), list(covered)  # alive, so that facts' ids are theirs
        uncovered = self.covered.count(False)
        self.workspace = torch.empty(max(compiled.workspace_bytes, 1), dtype=torch.uint8, device=device)
        self.external = self._doubles(compiled.external, 3 * uncovered).view(uncovered, 3)
        self.external_2 = self._doubles(compiled.external_2, 3 * uncovered).view(uncovered, 3)
        self.external_2.zero_()
        self.scales = self._doubles(compiled.scales, len(blocks))
        self.captured = False
        self.rates = Rates()
        self.watch = Watch(blocks)
        self.spectral, self.may_be_flat = False, [False] * len(blocks)  # whether polar factors are taken, and of what
        self.operators: Any = None  # those of covered blocks, an ``operators.Operators``
        self.generation = -1  # of them, as the compiled plan knows them

    def _doubles(self, offset: int, count: int) -> Tensor:
        return self.workspace[offset : offset + 8 * count].view(torch.float64)

    def polar(self, k: int, shape: tuple[int, int]) -> Tensor:
        """Block k's nat/‖nat‖ before, and nat's polar factor after, a θ step that takes it: a view, (m, n)."""
        (m, n), start = shape, self.native.polar(k)
        ld = -(-n // ALIGNED) * ALIGNED
        return self.workspace[start : start + 4 * m * ld].view(torch.float32).view(m, ld)[:, :n]

    def count(self, counters: Sequence[Tensor], covered: Sequence[bool], ok: Tensor, on_device: bool) -> bool:
        """Advance the counters that the op was given, where the kernels have not. Whether the step was taken; True
        where the host has no need to know. ``covered``: which counters are of blocks that the kernels cover.
        """
        taken = bool(ok) if self.native.counts_on_host or not on_device else True
        others = self.native.count_steps(taken)
        if others:
            advance([counters[k] for k in others if not (on_device and covered[k])], ok)
        return taken

    @property
    def stream(self) -> int:
        """The device's current stream."""
        return runtime().stream(self.device)


def described(op: Op, block: Block, facts: BlockFacts, gradient: BlockGradient | None, flat: bool) -> tuple:
    """A block as csrc/bindings/cuda.cpp takes it. ``flat``: nat gives way to its polar factor."""
    precision = PRECISIONS[block.structure.precision]
    if op is Op.REFRESH:
        return block.name, facts.kind, precision, *block.shape, block.axis, (), False
    if gradient is None:
        return block.name, UNCOVERED, precision, *block.shape, block.axis, (), flat
    parts = [
        (shape, strides, layout[0], kind, layout[1], offset, first)
        for (shape, strides, kind, first), layout, offset in zip(
            facts.layout, gradient.layouts, facts.offsets, strict=False
        )
    ]
    return block.name, facts.kind, precision, *block.shape, block.axis, parts, flat
