"""Sums over ranks, each of which only the owner of its block is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .sharding import Sharding

LEAST = 2**22  # entries that go together


class Expected(NamedTuple):
    """A tensor that ranks add up: of which block, what it is found by, its shape and its dtype."""

    block: int
    key: Any
    shape: torch.Size
    dtype: torch.dtype


def add_up(sums: dict[Any, Tensor], key: Any, t: Tensor) -> None:
    """Add t to what ``sums`` has under that key."""
    sums[key] = sums[key] + t if key in sums else t


class Reduction:
    """``take``: is given the key of each tensor and its sum, on the owner.

    Where ranks hold shards of a model they run its units together, so that tensors come in one order on all of them:
    they are sent as they come, some at a time. Where each has a whole one, a rank may lack some, and have others in
    another order: they are sent at the end, all that are ``expected``, zeros for those that a rank lacks.
    """

    def __init__(
        self,
        sharding: Sharding,
        owners: Sequence[int],
        take: Callable[[Any, Tensor], None],
        expected: Iterable[Expected],
    ) -> None:
        self._sharding, self._owners, self._take = sharding, owners, take
        self._expected = None if sharding.units else list(expected)
        self._waiting: list[tuple[int, Any, Tensor]] = []
        self._sums: dict[Any, Tensor] = {}
        self._entries = 0

    def add(self, block: int, key: Any, t: Tensor) -> None:
        """A tensor for the owner of ``block``; those of one key are added up."""
        if self._expected is not None:
            add_up(self._sums, key, t)
            return
        self._waiting.append((self._owners[block], key, t))
        self._entries += t.numel()
        if self._entries > LEAST:
            self._send()

    def finish(self, device: torch.device) -> None:
        """Nothing more comes."""
        for block, key, shape, dtype in self._expected or ():
            t = self._sums.pop(key, None)
            t = torch.zeros(shape, dtype=dtype, device=device) if t is None else t.to(dtype)
            self._waiting.append((self._owners[block], key, t))
            self._entries += t.numel()
            if self._entries > LEAST:
                self._send()
        self._send()

    def _send(self) -> None:
        waiting, self._waiting, self._entries = self._waiting, [], 0
        for owner, dtype in sorted({(owner, str(t.dtype)) for owner, _, t in waiting}):
            these = [(key, t) for o, key, t in waiting if o == owner and str(t.dtype) == dtype]
            flat = torch.cat([t.reshape(-1) for _, t in these])
            self._sharding.to_owner(flat, owner)
            if owner == self._sharding.index:
                pieces = flat.split([t.numel() for _, t in these])
                for (key, t), piece in zip(these, pieces, strict=True):
                    self._take(key, piece.view(t.shape))
