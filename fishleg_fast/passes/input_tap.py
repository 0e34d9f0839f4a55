"""What the model was last given, seen at its ``forward``."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .inputs import Inputs, graph_leaf


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
        self.last = Inputs(args, kwargs, _x_of(args, kwargs), autocast, tapped=True).map(lambda t: graph_leaf(t, t))

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
