"""Where curvature batches come from: the user's own loader, or the inputs that the model was last given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def tree_map(fn: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """``fn`` on every tensor of nested tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        return fn(tree)
    if isinstance(tree, Mapping):
        return {key: tree_map(fn, value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return (
            type(tree)(tree_map(fn, x) for x in tree)
            if type(tree) in (tuple, list)
            else tuple(tree_map(fn, x) for x in tree)
        )
    return tree


def batch_size(tree: Any) -> int | None:
    """The first dimension of the first tensor that has one."""
    if isinstance(tree, Tensor):
        return tree.shape[0] if tree.ndim else None
    items = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (tuple, list)) else ()
    return next((size for item in items if (size := batch_size(item)) is not None), None)


def rows(tree: Any, start: int, stop: int) -> Any:
    """Samples start … stop−1 of every tensor that runs over the batch."""
    size = batch_size(tree)
    return tree_map(lambda t: t[start:stop] if t.ndim and t.shape[0] == size else t, tree)


@dataclass
class Inputs:
    """What a model was called with: ``model(*args, **kwargs)``, under autocast to ``autocast`` if that was on."""

    args: tuple
    kwargs: dict[str, Any]
    autocast: torch.dtype | None = None

    @classmethod
    def of(cls, x: Any) -> Inputs:
        """From a loader's x: a tuple or list is spread over positional arguments, a mapping over named ones."""
        if isinstance(x, Mapping):
            return cls((), dict(x))
        return cls(tuple(x), {}) if isinstance(x, (tuple, list)) else cls((x,), {})

    def x(self) -> Any:
        """What a user's own nll(model, x, y) is handed."""
        if self.args and not self.kwargs:
            return self.args[0] if len(self.args) == 1 else self.args
        return {**dict(enumerate(self.args)), **self.kwargs} if self.args else self.kwargs

    def size(self) -> int:
        return batch_size((self.args, self.kwargs)) or 1

    def rows(self, start: int, stop: int) -> Inputs:
        args, kwargs = rows((self.args, self.kwargs), start, stop)
        return Inputs(args, kwargs, self.autocast)

    def detached(self) -> Inputs:
        args, kwargs = tree_map(Tensor.detach, (self.args, self.kwargs))
        return Inputs(args, kwargs, self.autocast)


class InputTap:
    """Stands in for ``model.forward`` and remembers the last inputs that were given with gradients enabled.

    An instance attribute and no hook, since ``model.forward(x)`` passes hooks by. Copies and pickles of the model do
    not carry it.
    """

    inner: Callable[..., Any]

    def __init__(self, model: nn.Module) -> None:
        inner = model.__dict__.get("forward", model.forward)
        self.inner = inner.inner if isinstance(inner, InputTap) else inner
        self.last: Inputs | None = None
        self.paused = False
        model.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and not self.paused:
            first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
            kind = "cpu" if first is None else first.device.type
            self.last = Inputs(
                args, kwargs, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            )
        return self.inner(*args, **kwargs)

    @contextmanager
    def pause(self) -> Iterator[None]:
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def __deepcopy__(self, memo: dict) -> Any:
        return copy.deepcopy(self.inner, memo)

    def __reduce__(self) -> tuple:
        return _itself, (self.inner,)


def _itself(x: Any) -> Any:
    return x


@contextmanager
def private_rng(seed: int, devices: Iterable[torch.device]) -> Iterator[None]:
    """torch's generators seeded with ``seed`` inside, and as they were outside."""
    cuda = [d.index if d.index is not None else torch.cuda.current_device() for d in devices if d.type == "cuda"]
    with torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


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
