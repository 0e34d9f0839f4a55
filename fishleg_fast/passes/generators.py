"""Random numbers of the optimizer's own, which leave torch's generators as they were."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor


class Seeds:
    """An endless sequence of seeds, whose place in it is two integers: where it began and how many were drawn."""

    def __init__(self, seed: int, rank: int = 0) -> None:
        self._generator = torch.Generator("cpu")
        # Of what it begins with, of which generators take 32 bits. Not in its state, which is that of all ranks.
        self._offset = rank * 1_000_003
        self.set_state((seed, 0))

    def draw(self) -> int:
        """The next seed."""
        self._drawn += 1
        return int(torch.randint(2**62, (), generator=self._generator, device="cpu"))

    def get_state(self) -> tuple[int, int]:
        return self._seed, self._drawn

    def set_state(self, state: tuple[int, int]) -> None:
        self._seed, self._drawn = state
        self._generator.manual_seed(self._seed + self._offset)
        torch.randint(2**62, (self._drawn,), generator=self._generator, device="cpu")

    def go_on_from(self, state: Tensor) -> None:
        """From the state of a torch generator, as checkpoints before version 2 have it."""
        self._generator.set_state(state.cpu())
        self.set_state((self.draw(), 0))


_ONE_AT_A_TIME = threading.RLock()  # what is seeded below, and forward derivatives' levels, are the whole process's


@contextmanager
def private_rng(seed: int, devices: Iterable[torch.device], foreign: bool = True) -> Iterator[None]:
    """torch's generators seeded with ``seed`` inside, and as they were outside; Python's and NumPy's too, where
    ``foreign`` code may use them. One thread at a time.
    """
    cuda = [d.index if d.index is not None else torch.cuda.current_device() for d in devices if d.type == "cuda"]
    with _ONE_AT_A_TIME, torch.random.fork_rng(cuda), _foreign_rng(seed) if foreign else nullcontext():
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


@contextmanager
def _foreign_rng(seed: int) -> Iterator[None]:
    before, numpy = random.getstate(), sys.modules.get("numpy.random")
    legacy = None if numpy is None else numpy.get_state(legacy=False)
    random.seed(seed)
    if numpy is not None:
        numpy.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(before)
        if numpy is not None:
            numpy.set_state(legacy)
