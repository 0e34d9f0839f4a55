"""Tile sizes, pinned: the choice fixes the order of summation, and so is part of reproducibility. No autotuning.

Not yet measured on a GPU: chosen for registers and shared memory, which the tests check for every row on every
architecture. ``benchmarks/gpu/pin_configurations.py`` derives the table anew on a given GPU.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """C (BM, BN) += A (BM, BK) B (BN, BK)ᵀ."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


class ElementwiseTile(NamedTuple):
    """A tile of an elementwise kernel."""

    ROWS: int
    COLS: int
    num_warps: int


class Sides(NamedTuple):
    """The same where something else sets the warps."""

    ROWS: int
    COLS: int


class Chunks(NamedTuple):
    """Pieces of tensors whose inner product is computed, in elements."""

    CHUNK: int
    num_warps: int


# Shape class -> what operands are multiplied in -> architecture (the nearest one below counts) -> tile.
# "small": where large tiles would not fill the chip. "epilogue": for products whose epilogue, or
# general strides, need the registers.
TILES: dict[str, dict[str, dict[int, Tile]]] = {
    "small": {
        "ieee": {80: Tile(32, 32, 16, 4, 3)},
        "tf32": {80: Tile(64, 64, 32, 4, 3)},
        "tf32x3": {80: Tile(64, 64, 16, 8, 2), 90: Tile(64, 64, 32, 4, 2)},
        "bf16": {80: Tile(64, 64, 32, 4, 3)},
    },
    "large": {
        "ieee": {80: Tile(64, 64, 16, 8, 3)},
        "tf32": {80: Tile(128, 64, 32, 4, 3), 90: Tile(128, 128, 32, 8, 3)},
        "tf32x3": {80: Tile(64, 64, 16, 8, 2), 90: Tile(128, 64, 32, 8, 2)},
        "bf16": {80: Tile(128, 64, 32, 4, 3), 90: Tile(128, 128, 32, 8, 3)},
    },
    "epilogue": {
        "ieee": {80: Tile(32, 32, 16, 8, 3)},
        "tf32": {80: Tile(64, 64, 32, 8, 3)},
        "tf32x3": {80: Tile(64, 64, 16, 8, 2), 90: Tile(64, 64, 32, 8, 2)},
        "bf16": {80: Tile(64, 64, 32, 8, 3)},
    },
}

_TUNED: dict[int, dict[str, dict[str, Tile]]] = {}  # capability -> what was measured on this machine's device, as TILES

ELEMENTWISE = ElementwiseTile(16, 128, 8)
COPY = ElementwiseTile(32, 32, 4)  # of a matrix that may be transposed
BESIDE_PRODUCTS = Sides(16, 64)  # elementwise tiles in kernels of products, whose warps they have
INNER_PRODUCTS = Chunks(4096, 8)


def elementwise_tiles(shape: tuple[int, int]) -> int:
    """How many ELEMENTWISE tiles a matrix takes."""
    return -(-shape[0] // ELEMENTWISE.ROWS) * -(-shape[1] // ELEMENTWISE.COLS)


def tune(capability: int, tiles: dict[str, dict[str, Tile]]) -> None:
    """Have ``tile`` give these in the place of pinned ones for this compute capability, until the next call."""
    _TUNED[capability] = tiles


def tile(shape: str, precision: str, capability: int) -> Tile:
    """The tile of a shape class for compute capability 80, 86, 90, 100, ...: a tuned one, or the pinned one, for which
    what is older counts as 80.
    """
    tuned = _TUNED.get(capability, {}).get(shape, {}).get(precision)
    if tuned is not None:
        return tuned
    tiles = TILES[shape][precision]
    return tiles[max((arch for arch in tiles if arch <= capability), default=min(tiles))]


def stored_twice(t: Tile) -> Tile:
    """Of products that are stored as their transposes too, which takes registers: fewer columns, more threads."""
    return t._replace(BN=min(t.BN, 64), num_warps=8) if t.BM > 64 else t


def shape_class(
    shapes: list[tuple[int, int]], precision: str, capability: int, processors: int, demanding: bool = False
) -> str:
    """ "large" where large tiles over matrices of these shapes give every processor one, else "small".

    demanding: "epilogue" in any case.
    """
    if demanding:
        return "epilogue"
    t = tile("large", precision, capability)
    return "large" if sum(-(-m // t.BM) * -(-n // t.BN) for m, n in shapes) >= processors else "small"


LIBRARY = 4096  # rows and columns; not yet measured on a GPU


def library_product(m: int, n: int, precision: str) -> bool:
    """Whether a block's products go to torch.mm, one block at a time.

    cuBLAS wins large square products; grouped launches win where one block does not fill the chip. From LIBRARY up one
    does many times over, and passes over memory beside a product cost little. Not the products that make P and S, of
    which symmetry halves the work; nor bf16, in which torch.mm would not multiply float32.
    """
    return min(m, n) >= LIBRARY and precision != "bf16"
