"""What the Triton kernels can reach at best, by counts alone: no GPU is needed, and nothing here was measured on one.

    python -m benchmarks.gpu.reach [--card H200] [--list ResNet18]

For each kernel of a step: its floor, what nothing can do without at the card's published peaks; and the time of what
the kernel does as it is tiled: whole tiles of FLOPs, what is read of the L2 cache (every tile reads its rows and its
columns of the operands), memory, and processors that wait while the last tiles are done. Reach is the one over the
other: a kernel cannot come nearer to its floor than that, whatever else it costs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.common.tables import table
from benchmarks.gpu.shapes import LISTS, Shape
from fishleg_fast.kernels.host.configurations import (
    ELEMENTWISE,
    Tile,
    elementwise_tiles,
    shape_class,
    stored_twice,
    tile,
)
from fishleg_fast.precision import PRECISIONS

STEPS = 6  # polynomial steps of a polar factor


class Card(NamedTuple):
    """Published peaks, dense: FLOPs and bytes a second. The L2 cache's is what others have measured."""

    capability: int
    processors: int
    memory: float
    cache: float
    flops: dict[str, float]  # by what operands are multiplied in


HOPPER = {"ieee": 66.9e12, "tf32": 494.7e12, "tf32x3": 494.7e12 / 3, "bf16": 989.4e12}
CARDS = {
    "H100": Card(90, 132, 3.35e12, 5.5e12, HOPPER),
    "H200": Card(90, 132, 4.8e12, 5.5e12, HOPPER),
    "A100": Card(80, 108, 2.04e12, 4.7e12, {"ieee": 19.5e12, "tf32": 156e12, "tf32x3": 52e12, "bf16": 312e12}),
}


class Product(NamedTuple):
    """C (m, n) of depth k. ``half``: of a symmetric C half the tiles are made."""

    m: int
    n: int
    k: int
    half: bool = False

    def tiles(self, t: Tile) -> int:
        """How many tiles of C are made."""
        rows, columns = -(-self.m // t.BM), -(-self.n // t.BN)
        return rows * (rows + 1) // 2 if self.half else rows * columns

    @property
    def flops(self) -> float:
        """That are needed."""
        return self.k * self.m * (self.m + 1) if self.half else 2 * self.m * self.n * self.k

    def done(self, t: Tile) -> float:
        """FLOPs of whole tiles."""
        return 2 * self.tiles(t) * t.BM * t.BN * (-(-self.k // t.BK) * t.BK)

    def read(self, t: Tile) -> float:
        """Bytes of the operands that the tiles read, float32."""
        return 4 * self.tiles(t) * (t.BM + t.BN) * self.k


class Kernel(NamedTuple):
    """One launch: its products, or ``tiles`` elementwise ones; and bytes that it reads and writes at the least."""

    name: str
    products: list[Product]
    config: Tile | None
    memory: float
    tiles: int = 0

    def floor(self, card: Card, precision: str) -> float:
        """Seconds."""
        return max(sum(p.flops for p in self.products) / card.flops[precision], self.memory / card.memory)

    def counted(self, card: Card, precision: str) -> tuple[float, str]:
        """Seconds of what the kernel does, and what takes them."""
        if self.config is None:
            tiles, flops, cache = self.tiles, 0.0, 0.0
        else:
            tiles = sum(p.tiles(self.config) for p in self.products)
            flops = sum(p.done(self.config) for p in self.products) / card.flops[precision]
            cache = sum(p.read(self.config) for p in self.products) / card.cache
        waiting = 1.0
        if self.config is not None and tiles:  # a tile each at a time; elementwise tiles are many and small
            waiting = -(-tiles // card.processors) * card.processors / tiles
        times = {"FLOPs": flops * waiting, "L2": cache, "memory": self.memory / card.memory}
        slowest = max(times, key=lambda name: times[name])
        idle = slowest == "FLOPs" and waiting > 1.25
        return times[slowest], slowest + (f", processors idle {1 - 1 / waiting:.0%}" if idle else "")


def kernels(shapes: Sequence[Shape], precision: str, card: Card) -> Iterator[Kernel]:
    """Those of a θ step with normalize="spectral", of an update of λ and of a refresh, for blocks of these shapes."""
    product = lambda given: tile(
        shape_class(given, precision, card.capability, card.processors), precision, card.capability
    )
    square = lambda t: t._replace(BM=min(t.BM, t.BN), BN=min(t.BM, t.BN))
    blocks, factors = sum(m * n for m, n in shapes), sum(m * m + n * n for m, n in shapes)
    rows, columns = sum(m * m for m, _ in shapes), sum(n * n for _, n in shapes)
    sides = [k for shape in shapes for k in shape]
    config = product(list(shapes))
    yield Kernel("θ: right, S m̂ᵀ", [Product(n, m, n) for m, n in shapes], config, 4 * (columns + 3 * blocks))
    yield Kernel("θ: left, P X", [Product(m, n, m) for m, n in shapes], config, 4 * (rows + 2 * blocks))
    yield Kernel("θ: update", [], None, 4 * 6 * blocks, sum(map(elementwise_tiles, shapes)))
    wide = [(min(s), max(s)) for s in shapes]
    halves = square(stored_twice(product([(k, k // 2) for k, _ in wide])))
    grams = sum(k * k for k, _ in wide)
    yield Kernel("polar: A = XXᵀ", [Product(k, k, long, True) for k, long in wide], halves, 4 * (blocks + grams))
    yield Kernel("polar: A²", [Product(k, k, k, True) for k, _ in wide], halves, 4 * 3 * grams)
    yield Kernel(
        "polar: BX", [Product(k, long, k) for k, long in wide], stored_twice(product(wide)), 4 * (grams + 3 * blocks)
    )
    refreshed = square(product([(k, k // 2) for k in sides]))
    yield Kernel("refresh: P and S", [Product(k, k, k, True) for k in sides], refreshed, 4 * 2 * factors)
    both = [Product(n, m, n) for m, n in shapes] + [Product(m, n, m) for m, n in shapes]
    yield Kernel("λ: Pw and wS", both, product([s for s in shapes for _ in range(2)]), 4 * (factors + 7 * blocks))
    pairs = [Product(n, n, m, True) for m, n in shapes] + [Product(m, m, n, True) for m, n in shapes]
    yield Kernel("λ: M + Mᵀ and N + Nᵀ", pairs, refreshed, 4 * (2 * factors + 4 * blocks))
    learned = square(tile("epilogue", precision, card.capability))
    yield Kernel("λ: gradients and Adam", [Product(k, k, k) for k in sides], learned, 4 * 8 * factors)
    yield Kernel("λ: commit, P and S", [Product(k, k, k, True) for k in sides], refreshed, 4 * 4 * factors)


def rows(shapes: Sequence[Shape], precision: str, card: Card) -> Iterator[list[str]]:
    """One of the table for each kernel, times in µs."""
    for kernel in kernels(shapes, precision, card):
        least, (counted, why) = kernel.floor(card, precision), kernel.counted(card, precision)
        yield [kernel.name, f"{1e6 * least:.2f}", f"{1e6 * counted:.2f}", f"{least / counted:.0%}", why]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--card", choices=CARDS, default="H100", help="(default: %(default)s)")
    parser.add_argument("--list", choices=LISTS, action="append", help="blocks of these only (default: all)")
    parser.add_argument("--precision", choices=PRECISIONS, default="high", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    card, precision = CARDS[args.card], PRECISIONS[args.precision][2]
    print(f"# By counts, for {args.card} at {args.precision!r}: nothing here was measured\n")
    print(f"Polar factors take their three kernels {STEPS} times. Elementwise tiles: {ELEMENTWISE}.\n")
    for name in args.list or LISTS:
        found = list(rows(LISTS[name], precision, card))
        print(f"## {name}\n")
        print(table(["kernel", "floor, µs", "by counts, µs", "reach", "what takes it"], found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
