"""Where curvature batches come from: the user's own loader, or the inputs that the model was last given."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


def tree_map(fn: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """``fn`` on every tensor of nested tuples, lists and mappings, whose types are kept."""
    if isinstance(tree, Tensor):
        return fn(tree)
    if isinstance(tree, PackedSequence):  # one whole: its lengths belong to its data
        return tree
    if isinstance(tree, Mapping):
        mapped = {key: tree_map(fn, value) for key, value in tree.items()}
        return mapped if type(tree) is dict else type(tree)(mapped)  # type: ignore[call-arg]
    if isinstance(tree, (tuple, list)):
        items = [tree_map(fn, x) for x in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def leading_sizes(tree: Any) -> set[int]:
    """The sizes of the first dimensions of all tensors that have one; -1 stands for what cannot be cut."""
    if isinstance(tree, Tensor):
        return {tree.shape[0]} if tree.ndim else set()
    if isinstance(tree, PackedSequence):
        return {-1}
    items = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (tuple, list)) else ()
    return set().union(*map(leading_sizes, items))


def _leaf(tensor: Tensor, like: Tensor) -> Tensor:
    """Off the graph, but differentiable where ``like`` is: some models differentiate by their inputs."""
    return tensor.detach().requires_grad_(like.requires_grad)


@dataclass
class Inputs:
    """A batch: what the model is called with, ``model(*args, **kwargs)``, and the x of a user's nll(model, x, y).

    ``autocast`` is the dtype of autocast, if that was on. ``tapped``: seen at the model's forward, past its hooks.
    """

    args: tuple
    kwargs: dict[str, Any]
    x: Any
    autocast: torch.dtype | None = None
    tapped: bool = False

    @classmethod
    def of(cls, x: Any) -> Inputs:
        """From a loader's x: a tuple or list is spread over positional arguments, a mapping over named ones."""
        if isinstance(x, Mapping):
            return cls((), dict(x), x)
        plain = isinstance(x, (tuple, list)) and not hasattr(x, "_fields")
        return cls(tuple(x) if plain else (x,), {}, x)

    def _tree(self) -> tuple[tuple, dict[str, Any], Any]:
        return self.args, self.kwargs, self.x

    def size(self) -> int:
        """Samples in the batch: the first dimension of its tensors, or 1 where they do not agree on one."""
        sizes = leading_sizes(self._tree())
        return sizes.pop() if len(sizes) == 1 and -1 not in sizes else 1

    def rows(self, start: int, stop: int) -> Inputs:
        """Samples start … stop−1, where all tensors run over the batch; else the whole batch."""
        if len(leading_sizes(self._tree())) != 1 or -1 in leading_sizes(self._tree()):
            return self
        return self.map(lambda t: _leaf(t[start:stop], t) if t.ndim else t)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Inputs:
        args, kwargs, x = tree_map(fn, self._tree())
        return Inputs(args, kwargs, x, self.autocast, self.tapped)

    def copied(self) -> Inputs:
        """Apart from the graph and the memory of the user's tensors: a model may write to its inputs."""
        return self.map(lambda t: _leaf(t.detach().clone(), t))


def inside_functorch() -> bool:
    """Whether this runs inside grad, vmap or another transform of torch.func, whose tensors must not leave it."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class Pausable:
    """What sees the user's passes, and not the optimizer's own."""

    paused = False

    @contextmanager
    def pause(self) -> Iterator[None]:
        """See nothing inside."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before


class InputTap(Pausable):
    """Stands in for ``model.forward`` and remembers the last inputs that were given with gradients enabled.

    An instance attribute and no hook, since ``model.forward(x)`` passes hooks by. Deep copies and pickles of the model
    do not carry it, and it goes with the last optimizer that uses it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._instance_forward = model.__dict__.get("forward")  # some other library's stand-in
        self._users = 0
        self.last: Inputs | None = None

    @classmethod
    def on(cls, model: nn.Module, user: object | None) -> InputTap:
        """The model's tap, new or shared with other optimizers, for as long as ``user`` lives (None: for good)."""
        tap = model.__dict__.get("forward")
        if not isinstance(tap, InputTap):
            tap = cls(model)
            model.forward = tap
        tap._users += 1
        if user is not None:
            weakref.finalize(user, tap._release)
        return tap

    def _release(self) -> None:
        self._users -= 1
        model = self._model()
        if self._users or model is None or model.__dict__.get("forward") is not self:
            return
        del model.__dict__["forward"]
        if self._instance_forward is not None:
            model.__dict__["forward"] = self._instance_forward

    @property
    def inner(self) -> Callable[..., Any]:
        """The model's forward without the tap."""
        if self._instance_forward is not None:
            return self._instance_forward
        model = self._model()
        assert model is not None  # it is what calls
        return type(model).forward.__get__(model)

    @property
    def __wrapped__(self) -> Callable[..., Any]:  # for inspect.signature(model.forward)
        return self.inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        untouched = torch.jit.is_tracing() or (not torch.compiler.is_compiling() and inside_functorch())
        if torch.is_grad_enabled() and not self.paused and not untouched:
            self._remember(args, kwargs)
        return self.inner(*args, **kwargs)

    def _remember(self, args: tuple, kwargs: dict[str, Any]) -> None:
        model = self._model()
        kind = next((p.device.type for p in model.parameters()), "cpu") if model is not None else "cpu"
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.last = Inputs(args, kwargs, _x_of(args, kwargs), autocast, tapped=True).map(lambda t: _leaf(t, t))

    def __deepcopy__(self, memo: dict) -> Any:
        return copy.deepcopy(self.inner, memo)

    def __reduce__(self) -> tuple:
        return _itself, (self.inner,)


def _x_of(args: tuple, kwargs: dict[str, Any]) -> Any:
    if kwargs:
        return {**dict(enumerate(args)), **kwargs}
    return args[0] if len(args) == 1 else args


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
