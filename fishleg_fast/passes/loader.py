"""Batches from the user's own loader, for the curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from .generators import private_rng


class AuxBatches:
    """Endless batches from ``loader`` through one persistent iterator, resumable by replaying its pass.

    A loader's shuffling draws from torch's generators, so that each pass begins under a seed of its own: the same seed
    and the same number of batches lead to the same place.
    """

    def __init__(self, loader: Iterable[Any], devices: list[torch.device]) -> None:
        self.loader, self.devices = loader, devices
        self.seed, self.taken = 0, 0
        self._iterator: Iterator[Any] | None = None

    def next(self, new_seed: Callable[[], int]) -> Any:
        """The next batch; ValueError where the loader has none."""
        if self._iterator is None and self.taken:  # resumed: replay the pass
            taken = self.taken
            self._open(self.seed)
            while self.taken < taken and self._pull() is not _END:
                pass
        for _ in range(2):
            if self._iterator is None:
                self._open(new_seed())
            item = self._pull()
            if item is not _END:
                return item
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
        return {"seed": self.seed, "taken": self.taken}

    def load(self, state: Mapping[str, int]) -> None:
        self.seed, self.taken, self._iterator = state["seed"], state["taken"], None


_END = object()
