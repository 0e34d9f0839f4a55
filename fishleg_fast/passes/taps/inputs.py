"""What the model was last given, seen at its ``forward``."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor, nn

from ..batch_rule import Call
from ..inputs import Inputs, Writes, output_shapes, own_leaf, seen_leaf, tree_map, version


def inside_functorch() -> bool:
    """Whether this runs inside grad, vmap or another transform of torch.func, whose tensors must not leave it."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class Pausable:
    """What sees the user's passes, and not the optimizer's own."""

    def __init__(self) -> None:
        self.paused = False  # no default of the class's: torch.compile would see another object after the first pause

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

    An instance attribute and no hook, since ``model.forward(x)`` passes hooks by. It stays with this one module: copies
    and pickles of it are without, DataParallel's replicas have stand-ins of their own. It goes with the last optimizer
    that uses it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = weakref.ref(model)
        self._instance_forward = model.__dict__.get("forward")  # some other library's stand-in
        self._users = 0
        self.writes = Writes()
        self.last: Inputs | None = None
        self.earlier: Call | None = None  # the latest one before that of another size
        self._size: int | None = None  # of the first tensor in the last
        self._resumed: Call | None = None  # the last, where that was before a checkpoint
        self.listeners: weakref.WeakSet[Any] = weakref.WeakSet()  # told of calls and of what the model returns

    @classmethod
    def on(cls, model: nn.Module, user: object | None) -> InputTap:
        """The model's tap, new or shared with other optimizers, for as long as ``user`` lives (None: for good)."""
        tap = model.__dict__.get("forward")
        if not isinstance(tap, InputTap):
            tap = cls(model)
            model.__dict__.update(zip(_ATTRIBUTES, (tap, tap._state, tap._replicate), strict=True))
        tap._users += 1
        if user is not None:
            weakref.finalize(user, tap._release)
        return tap

    def _release(self) -> None:
        self._users -= 1
        model = self._model()
        if not self._users and model is not None and model.__dict__.get("forward") is self:
            self._remove_from(model.__dict__)

    def _remove_from(self, attributes: dict[str, Any]) -> None:
        for name in _ATTRIBUTES:
            attributes.pop(name, None)
        if self._instance_forward is not None:
            attributes["forward"] = self._instance_forward

    def _state(self) -> Any:
        """The model's ``__getstate__``, which copy and pickle ask an instance for."""
        model = self._own
        kind = type(model)
        state = kind.__getstate__(model) if hasattr(kind, "__getstate__") else model.__dict__
        if isinstance(state, dict) and state.get("forward") is self:
            state = dict(state)
            self._remove_from(state)
        return state

    def _replicate(self) -> nn.Module:
        """The model's ``_replicate_for_data_parallel``: a shallow copy, which is given parameters of its own later."""
        model = self._own
        replica = type(model)._replicate_for_data_parallel(model)
        self._remove_from(replica.__dict__)
        if self._instance_forward is None:
            replica.__dict__["forward"] = _ReplicaTap(self, replica)
        return replica

    @property
    def _own(self) -> nn.Module:
        model = self._model()
        assert model is not None  # it is what calls
        return model

    @property
    def inner(self) -> Callable[..., Any]:
        """The model's forward without the tap."""
        if self._instance_forward is not None:
            return self._instance_forward
        return type(self._own).forward.__get__(self._own)

    @property
    def __wrapped__(self) -> Callable[..., Any]:  # for inspect.signature(model.forward)
        return self.inner

    def __getattr__(self, name: str) -> Any:
        if name == "__code__":  # which torch.export asks for
            return self.inner.__code__
        asks = name == "__globals__"
        remedy = "; torch.jit.script takes a model before its optimizer is made, or when that is gone" if asks else ""
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{remedy}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        note_outputs = self.remember(args, kwargs)
        # Looked up after that, where torch.compile cannot trace that: it would take the method for model.forward, this.
        outputs = self.inner(*args, **kwargs)
        if note_outputs is not None:
            note_outputs(outputs)
        return outputs

    def remember(self, args: tuple, kwargs: dict[str, Any], elsewhere: bool = True) -> Callable[[Any], None] | None:
        """Remember these inputs, if a pass of the user's that needs gradients has them. What is returned is to be told
        what the model makes of them.

        ``elsewhere``: even if they are not on the model's own device.
        """
        untouched = torch.jit.is_tracing() or (not torch.compiler.is_compiling() and inside_functorch())
        if not torch.is_grad_enabled() or self.paused or untouched:
            return None
        model = self._model()
        device = next((p.device for p in model.parameters()), None) if model is not None else None
        kind = "cpu" if device is None else device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        traced = torch.compiler.is_compiling()
        leaf = own_leaf if (self.writes.seen if traced else self.writes.expected) else seen_leaf
        tensors: list[Tensor] = []
        args, kwargs = tree_map(lambda t: tensors.append(t) or leaf(t), (args, kwargs))  # type: ignore[func-returns-value]
        found = Inputs(args, kwargs, _x_of(args, kwargs), autocast, tapped=True)
        if not elsewhere and any(t.device != device for t in tensors):
            return None
        if traced:  # there are no numbers to be remembered
            self.last = found
            return None
        size = next((t.shape[0] for t in tensors if not t.is_nested and t.ndim), None)
        if size != self._size:
            self.earlier = self._latest() or self.earlier
        self._size, self._resumed = size, None
        self.last = found
        for listener in self.listeners:
            listener.called()
        versions = [*map(version, tensors)]

        def note_outputs(outputs: Any) -> None:
            found.outputs = output_shapes(outputs)
            self.writes.look(tensors, versions)
            for listener in self.listeners:
                listener.returned(outputs)

        return note_outputs

    def _latest(self) -> Call | None:
        """The last call, if it is known what the model made of it."""
        seen = self.last if self.last is not None and self.last.outputs is not None else None
        return self._resumed or (None if seen is None else Call.of(seen))

    def state(self) -> tuple[Any, ...]:
        """What is known of the calls seen, plain data: no inputs."""
        return self._size, *(None if call is None else astuple(call) for call in (self.earlier, self._latest()))

    def load(self, state: tuple[Any, ...]) -> None:
        """Go on from there."""
        self._size, (self.earlier, self._resumed) = state[0], map(Call.again, state[1:])

    def __deepcopy__(self, memo: dict) -> Any:
        return copy.deepcopy(self.inner, memo)

    def __reduce__(self) -> tuple:
        return _itself, (self.inner,)


_ATTRIBUTES = ("forward", "__getstate__", "_replicate_for_data_parallel")  # of the model that has a tap


class _ReplicaTap:
    """Stands in for the forward of one replica of the model's, which computes with its own parameters."""

    def __init__(self, tap: InputTap, replica: nn.Module) -> None:
        self.tap, self._replica = tap, weakref.ref(replica)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        replica, note_outputs = self._replica(), self.tap.remember(args, kwargs, elsewhere=False)
        assert replica is not None  # it is what calls
        outputs = type(replica).forward(replica, *args, **kwargs)
        if note_outputs is not None:
            note_outputs(outputs)
        return outputs


def _x_of(args: tuple, kwargs: dict[str, Any]) -> Any:
    if kwargs:
        return {**dict(enumerate(args)), **kwargs}
    return args[0] if len(args) == 1 else args


def _itself(x: Any) -> Any:
    return x
