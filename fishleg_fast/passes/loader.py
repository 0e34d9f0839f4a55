"""Batches from the user's own loader, for the curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from .generators import private_rng


class _Taken(NamedTuple):
    """A batch, the seed of the loader's pass that it is of, its number in that, and whether that pass began with it."""

    item: Any
    seed: int
    number: int
    first: bool


class AuxBatches:
    """Endless batches from ``loader`` through one persistent iterator, resumable by replaying its pass.

    A loader's shuffling draws from torch's generators, so that each pass begins under a seed of its own: the same seed
    and the same number of batches lead to the same place.
    """

    def __init__(self, loader: Iterable[Any], devices: list[torch.device]) -> None:
        self.loader, self.devices = loader, devices
        self.seed, self.taken = 0, 0  # where the iterator is
        self._used = 0, 0  # where they were that were used
        self._iterator: Iterator[Any] | None = None
        self._ahead: list[_Taken] = []  # looked at, and to be used yet
        self._looked_at: list[_Taken] | None = None

    @contextmanager
    def looking_ahead(self) -> Iterator[None]:
        """What is taken inside comes again afterwards."""
        self._looked_at = []
        try:
            yield
        finally:
            self._ahead, self._looked_at = [*self._looked_at, *self._ahead], None

    def next(self, new_seed: Callable[[], int]) -> Any:
        """The next batch; ValueError where the loader has none."""
        if not self._ahead:
            found = self._pulled(new_seed)
        else:
            found = self._ahead.pop(0)
            if found.first:
                new_seed()  # that of its pass, once more: what follows draws the same seeds
        if self._looked_at is None:
            self._used = found.seed, found.number
        else:
            self._looked_at.append(found)
        return found.item

    def _pulled(self, new_seed: Callable[[], int]) -> _Taken:
        if self._iterator is None and self.taken:  # resumed: replay the pass
            taken = self.taken
            self._open(self.seed)
            while self.taken < taken and self._pull() is not _END:
                pass
        first = False
        for _ in range(2):
            if self._iterator is None:
                self._open(new_seed())
                first = True
            item = self._pull()
            if item is not _END:
                return _Taken(item, self.seed, self.taken, first)
            self._iterator = None
        raise ValueError("aux_loader gave no batch: it should be re-iterable, like a DataLoader, and not empty")

    def _open(self, seed: int) -> None:
        self.seed, self.taken = seed, 0
        with private_rng(seed, self.devices):
            self._iterator = iter(self.loader)

    def _pull(self) -> Any:
        assert self._iterator is not None
        with private_rng(self.seed + self.taken, self.devices):
            item = next(self._iterator, _END)
        self.taken += item is not _END
        return item

    def state(self) -> dict[str, int]:
        return {"seed": self._used[0], "taken": self._used[1]}

    def load(self, state: Mapping[str, int]) -> None:
        self.seed, self.taken, self._iterator = state["seed"], state["taken"], None
        self._used, self._ahead = (self.seed, self.taken), []


_END = object()
