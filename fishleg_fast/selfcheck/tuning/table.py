"""The table of what was measured to be fastest on a device, where it was: without, the pinned one counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...kernels.host import configurations
from .. import cache
from ..families import Choice
from ..identity import identity

Tiles = Mapping[str, Mapping[str, Sequence[int]]]  # shape class -> what operands are multiplied in -> Tile's fields

_known: dict[tuple[Path | None, str], Tune] = {}  # of this process: by the cache folder and the device
_in_use: dict[torch.device, Tiles] = {}


@dataclass(frozen=True)
class Tune:
    """What is fastest on a device.

    tiles: of the Triton kernels. fastest: precision -> family -> shape class -> backend. seconds: what both are by.
    """

    tiles: Tiles = field(default_factory=dict)
    fastest: Mapping[str, Choice] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Any) -> Tune:
        """ValueError, TypeError or AttributeError where it is none."""
        made = cls(**value)
        tiles = [tile for rows in made.tiles.values() for tile in rows.values()]
        names = [n for choice in made.fastest.values() for by_class in choice.values() for n in by_class.values()]
        if any(len(t) != 5 or not all(isinstance(k, int) and k > 0 for k in t) for t in tiles):
            raise ValueError("tiles should be of five positive integers each")
        if not all(isinstance(name, str) for name in names):
            raise ValueError("the fastest backends should be names")
        return made


def tune_of(device: torch.device) -> Tune:
    """The cached table of this device, read once in a process; an empty one where there is none."""
    about = identity(device)
    key = cache.folder(), str(about)
    if key not in _known:
        _known[key] = cache.load("tune", about, Tune.from_json) or Tune()
    return _known[key]


def save(device: torch.device, tune: Tune) -> Path | None:
    """Where it was written to, for this process and those to come; see ``cache.save``."""
    _known[cache.folder(), str(identity(device))] = tune
    return cache.save("tune", identity(device), asdict(tune))


def take_tuned_tiles(device: torch.device) -> Tune:
    """Have the device's Triton kernels launched with its tuned tiles, if there are any, from now on."""
    tune = tune_of(device)
    if _in_use.get(device, {}) != tune.tiles:
        _in_use[device] = tune.tiles
        use_tiles(device, tune.tiles)
    return tune


def capability(device: torch.device) -> int:
    """As ``kernels.host.launch.capability``, without Triton."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def use_tiles(device: torch.device, tiles: Tiles) -> None:
    """Have kernels on devices of this capability launched with these; a row that is missing stays pinned."""
    configurations.tune(
        capability(device),
        {shape: {kind: configurations.Tile(*t) for kind, t in rows.items()} for shape, rows in tiles.items()},
    )
