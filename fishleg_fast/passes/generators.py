"""Random numbers of the optimizer's own, which leave torch's generators as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Seeds:
    """An endless sequence of seeds, whose place in it is two integers: where it began and how many were drawn."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cpu")
        self.set_state((seed, 0))

    def draw(self) -> int:
        """The next seed."""
        self._drawn += 1
        return int(torch.randint(2**62, (), generator=self._generator, device="cpu"))

    def get_state(self) -> tuple[int, int]:
        return self._seed, self._drawn

    def set_state(self, state: tuple[int, int]) -> None:
        self._seed, self._drawn = state
        self._generator.manual_seed(self._seed)
        torch.randint(2**62, (self._drawn,), generator=self._generator, device="cpu")

    def go_on_from(self, state: Tensor) -> None:
        """From the state of a torch generator, as checkpoints before version 2 have it."""
        self._generator.set_state(state.cpu())
        self.set_state((self.draw(), 0))


@contextmanager
def private_rng(seed: int, devices: Iterable[torch.device]) -> Iterator[None]:
    """torch's generators seeded with ``seed`` inside, and as they were outside."""
    cuda = [d.index if d.index is not None else torch.cuda.current_device() for d in devices if d.type == "cuda"]
    with torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield
