"""Blocks that share a θ step's launches: their rows and schedules."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..configurations import COPY, ELEMENTWISE, Tile
from ..tables.block_rows import BlockRows
from ..tables.uploads import Schedule, schedule, tiles


@dataclass
class Group:
    """Blocks that share launches: gradients of one dtype, parameters of one dtype, one precision."""

    device: torch.device
    precision: str
    scaled: bool  # whether any has an outer diagonal A
    rows: BlockRows
    config: Tile
    factored: list[int] = field(default_factory=list)  # row numbers of the FACTORED kinds
    diagonal: list[tuple[int, int]] = field(default_factory=list)  # (row, its first tile's number in the block)
    polar: list[int] = field(default_factory=list)  # row numbers of those whose polar factors are computed
    core_rows: BlockRows = field(default_factory=BlockRows)  # of DiagKron blocks

    def product_constants(self) -> dict:
        """What the kernels of products are compiled for."""
        return {
            "PRECISION": self.precision, "SCALED": self.scaled, **self.rows.constants(), **self.config._asdict(),
        }  # fmt: skip

    def right_tiles(self) -> Schedule:
        """(row, tile of n, tile of m, term)"""
        shapes = self.rows.shapes
        found = [(k, shapes[k][1], shapes[k][0], term) for k in self.factored for term in range(shapes[k][2])]
        return schedule(tiles(found, self.config.BM, self.config.BN), self.device)

    def left_tiles(self) -> Schedule:
        """(row, tile of m, tile of n, its number)"""
        found = [(k, *self.rows.shapes[k][:2], 0) for k in self.factored]
        return schedule(tiles(found, self.config.BM, self.config.BN, numbered=True), self.device)

    def diagonal_tiles(self) -> Schedule:
        """(row, tile of rows, tile of columns, its number) of Diagonal blocks."""
        found = [(k, *self.rows.shapes[k][:2], number) for k, number in self.diagonal]
        return schedule(tiles(found, ELEMENTWISE.ROWS, ELEMENTWISE.COLS, numbered=True), self.device)

    def unit_tiles(self) -> Schedule:
        """(row, tile of rows, tile of columns, unused) of matrices whose polar factors are computed."""
        found = [(k, *self.rows.shapes[k][:2], 0) for k in self.polar]
        return schedule(tiles(found, COPY.ROWS, COPY.COLS), self.device)

    def update_tiles(self) -> Schedule:
        """(row, tile of rows, tile of columns, unused)"""
        found = [(k, m, n, 0) for k, (m, n, _) in enumerate(self.rows.shapes)]
        return schedule(tiles(found, ELEMENTWISE.ROWS, ELEMENTWISE.COLS), self.device)
