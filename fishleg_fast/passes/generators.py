"""Random numbers of the optimizer's own, which leave torch's generators as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def private_rng(seed: int, devices: Iterable[torch.device]) -> Iterator[None]:
    """torch's generators seeded with ``seed`` inside, and as they were outside."""
    cuda = [d.index if d.index is not None else torch.cuda.current_device() for d in devices if d.type == "cuda"]
    with torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield
