"""The iterations for the polar factors of a θ step: 18 launches for all blocks of one precision."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ....algebra.polar import COEFFICIENTS
from ....model.block import Block
from ...device.polar import apply_kernel, symmetric_kernel
from ...device.row_layout import POLAR
from ..configurations import Tile, shape_class, stored_twice, tile
from ..coverage import FACTORED
from ..launch import Launch, capability, processors
from ..refresh import square_tile
from ..state import polar_scratch_of, workspace_of
from ..tables.strides import padded
from ..tables.uploads import Schedule, schedule, tiles, upload_rows
from ..tables.workspace import PolarBuffers

assert len(COEFFICIENTS) % 2 == 0  # Xᵀ ends where it began


def polar_buffers(block: Block, kind: str | None, after: bool) -> PolarBuffers:
    """Memory for the block's polar factor: that of Q's products where nothing else will read it.

    With momentum after Q, the update still reads Q g.
    """
    m, n = block.shape
    short, long = sorted(block.shape)
    own, workspace = polar_scratch_of(block), workspace_of(block) if kind in FACTORED else None
    out = None if workspace is None or after else workspace.out
    XT = None if workspace is None or workspace.terms > 1 else workspace.XT
    return PolarBuffers(
        own.scratch("polar", m, padded(n)) if out is None else out,
        own.scratch("polar_t", n, padded(m)) if XT is None else XT,
        own.scratch("next_xt", long, padded(short)),
        own.scratch("A", short, padded(short)),
        own.scratch("B", short, padded(short)),
    )


@dataclass
class PolarFactors:
    """The iterations for blocks of one precision, prepared."""

    device: torch.device
    precision: str
    shapes: list[tuple[int, int]] = field(default_factory=list)  # (short, long)
    buffers: list[PolarBuffers] = field(default_factory=list)

    def append(self, shape: tuple[int, int], buffers: PolarBuffers) -> None:
        """One matrix nat more, of this shape."""
        self.shapes.append((min(shape), max(shape)))
        self.buffers.append(buffers)

    @cached_property
    def symmetric_tile(self) -> dict:
        """For A and B."""
        return square_tile(self.precision, [short for short, _ in self.shapes], self.device, narrow=True)

    @cached_property
    def apply_tile(self) -> Tile:
        """For BX."""
        arch = capability(self.device)
        found = shape_class(self.shapes, self.precision, arch, processors(self.device))
        return stored_twice(tile(found, self.precision, arch))

    @cached_property
    def halves(self) -> Schedule:
        """(row, i, j ≤ i, number of the tile)"""
        sides = self.symmetric_tile
        squares = [(k, short, short, 0) for k, (short, _) in enumerate(self.shapes)]
        return schedule(tiles(squares, sides["BM"], sides["BN"], half=True, numbered=True), self.device)

    @cached_property
    def wholes(self) -> Schedule:
        """(row, tile of the short side, tile of the long side, unused)"""
        found = [(k, short, long, 0) for k, (short, long) in enumerate(self.shapes)]
        return schedule(tiles(found, self.apply_tile.BM, self.apply_tile.BN), self.device)

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """The rows of odd steps, and those of even ones, which find Xᵀ where the others put it."""
        return self._table(False), self._table(True)

    def _table(self, turned: bool) -> Tensor:
        rows, slot = [], 0
        for (short, long), b, slots in zip(self.shapes, self.buffers, self._slots, strict=True):
            tall = b.polar.shape[0] > short
            X, XT = (b.polar_t, b.polar) if tall else (b.polar, b.polar_t)
            given, following = (b.next_xt, XT) if turned else (XT, b.next_xt)
            rows.append(POLAR.pack(
                SHORT=short, LONG=long, SHORT_PADDED=padded(short), LONG_PADDED=padded(long), X=X.data_ptr(),
                XT=given.data_ptr(), NEXT_XT=following.data_ptr(), A=b.A.data_ptr(), B=b.B.data_ptr(),
                SLOT=slot, SLOTS=slots,
            ))  # fmt: skip
            slot += slots
        return upload_rows(rows, torch.int64, self.device)

    @cached_property
    def _slots(self) -> list[int]:
        """How many partial sums of ‖A²‖² each has."""
        across = [-(-short // self.symmetric_tile["BM"]) for short, _ in self.shapes]
        return [k * (k + 1) // 2 for k in across]

    @cached_property
    def launches(self) -> list[Launch]:
        """From nat/‖nat‖ and its transpose to the polar factor and its."""
        halves, wholes = (*self.halves, self.symmetric_tile), (*self.wholes, self.apply_tile._asdict())
        squares = torch.empty(sum(self._slots), dtype=torch.float32, device=self.device)
        bounds = torch.empty(len(self.shapes), dtype=torch.float32, device=self.device)
        arrived = torch.zeros(len(self.shapes), dtype=torch.int32, device=self.device)
        found = []
        for step, (keep, linear, quadratic) in enumerate(COEFFICIENTS):
            rows, first = self.tables[step % 2], step == 0
            for stage in ("gram", "bound" if first else "combined"):
                args = (squares, bounds, arrived, linear, quadratic)
                found.append(self._launch(symmetric_kernel, rows, halves, args, STAGE=stage))
            found.append(self._launch(apply_kernel, rows, wholes, (bounds, keep, linear, quadratic), FIRST=first))
        return found

    def _launch(self, kernel: object, rows: Tensor, work: tuple, args: tuple, **constants: Any) -> Launch:
        entries, count, sides = work
        shared = {"device": self.device, "PRECISION": self.precision, **sides}
        return Launch(kernel, count, (rows, entries, *args), {**shared, **constants})
