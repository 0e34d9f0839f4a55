"""Finding what is fastest on a device: tiles of the Triton kernels, and backends by op and shape class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from ...backends.arithmetic import own_arithmetic
from ...backends.protocol import Ops
from ...kernels.host import configurations
from ...kernels.host.configurations import TILES, Tile
from ...precision import kernel_precision
from ..families import SHAPE_CLASSES
from . import timing
from .table import Tune, capability
from .timing import Clock

CLEARLY = 0.97  # of a time: what is not faster than that is not taken for what is pinned
Say = Callable[[str], object]


def times_of_tiles(
    shape: str, kind: str, device: torch.device, ops: Ops, tiles: Iterable[Tile], clock: Clock = timing.seconds
) -> Iterator[tuple[Tile, float | Exception]]:
    """How long steps take with each tile in the place of what is pinned for the class; an error where they do not run,
    such as too little shared memory, by whatever name Triton gives it.
    """
    arch = capability(device)
    try:
        for tile in tiles:
            rows = TILES if shape != "epilogue" else [shape]  # whatever the shapes, what is timed is this tile
            configurations.tune(arch, {row: {kind: tile} for row in rows})
            try:
                with torch.no_grad():
                    found = clock(timing.tile_call(shape, kind, device, ops))
                yield tile, found
            except Exception as error:
                yield tile, error
    finally:
        configurations.tune(arch, {})


def fastest_tile(
    shape: str, kind: str, device: torch.device, ops: Ops, clock: Clock = timing.seconds
) -> tuple[Tile, float] | None:
    """A tile that is clearly faster than the pinned one, found by changing its sides, its depth, and then warps and
    stages; None where that is none.
    """
    pinned = configurations.tile(shape, kind, capability(device))
    known: dict[Tile, float] = {}

    def measure(tiles: Sequence[Tile]) -> Tile:
        for tile, found in times_of_tiles(shape, kind, device, ops, [t for t in tiles if t not in known], clock):
            known[tile] = float("inf") if isinstance(found, Exception) else found
        return min(known, key=known.__getitem__)

    possible, best = timing.candidates(kind), measure([pinned])
    for fields in (("BM", "BN"), ("BK",), ("num_warps", "num_stages")):
        others = [f for f in Tile._fields if f not in fields]
        best = measure([t for t in possible if all(getattr(t, f) == getattr(best, f) for f in others)])
    return (best, known[best]) if known[best] < CLEARLY * known[pinned] else None


def tuned_tiles(precision: str, device: torch.device, ops: Ops, say: Say, clock: Clock = timing.seconds) -> Tune:
    """Tiles for one precision."""
    kind, tiles, times = kernel_precision(precision), {}, {}
    for shape in TILES:
        found = fastest_tile(shape, kind, device, ops, clock)
        if found is not None:
            tiles[shape] = {kind: list(found[0])}
            times[f"tile/{shape}/{kind}"] = found[1]
        say(f"tile  {shape:<8}  {kind:<6}  {found[0] if found else 'the pinned one'}")
    return Tune(tiles=tiles, seconds=times)


def fastest_backends(
    backends: Mapping[str, Ops],
    right: Mapping[str, Sequence[str]],
    precision: str,
    device: torch.device,
    say: Say,
    clock: Clock = timing.seconds,
) -> Tune:
    """The fastest backend by family and shape class: of those that are ``right`` (name -> families), in the order in
    which they count without a tune, where others are not clearly faster.
    """
    chosen: dict[str, dict[str, str]] = {}
    times: dict[str, float] = {}
    for kind in SHAPE_CLASSES:
        for name, ops in backends.items():
            blocks = timing.layers(timing.CLASS_LAYERS[kind], device)
            with torch.no_grad(), own_arithmetic(blocks, precision):
                try:
                    calls = timing.calls(blocks, ops)
                except Exception as error:
                    say(f"{name} on {kind} blocks: {type(error).__name__}: {error}")
                    continue
                for family in timing.TIMED:
                    if family in right[name]:
                        times[f"{precision}/{family}/{kind}/{name}"] = clock(calls[family])
        for family in timing.TIMED:
            mine = {n: t for n in backends if (t := times.get(f"{precision}/{family}/{kind}/{n}")) is not None}
            best = next(iter(mine))
            for name, found in mine.items():
                best = name if found < CLEARLY * mine[best] else best
            chosen.setdefault(family, {})[kind] = best
            say(f"{kind:<6}  {family:<11}  " + ", ".join(f"{n} {t * 1e6:.0f} µs" for n, t in mine.items()))
    return Tune(fastest={precision: chosen}, seconds=times)


def merged(old: Tune, new: Tune) -> Tune:
    """Both tables; what both have is the new one's."""
    tiles = {shape: {**old.tiles.get(shape, {}), **new.tiles.get(shape, {})} for shape in {**old.tiles, **new.tiles}}
    return replace(old, tiles=tiles, fastest={**old.fastest, **new.fastest}, seconds={**old.seconds, **new.seconds})
