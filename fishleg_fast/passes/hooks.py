"""Forward hooks that stay with one optimizer: neither copies of the model nor its pickles carry them on."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .input_tap import Pausable, inside_functorch


class _Hook:
    """A forward hook that stays behind where its module is copied or pickled."""

    def __init__(self, call: Callable[..., None]) -> None:
        self.call = call

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.call(module, args, output)

    def __reduce__(self) -> tuple:
        return _Hook, (_nothing,)


def _nothing(*args: Any) -> None:
    """What a copied hook does."""


class LayerHooks(Pausable):
    """Sees forward passes of layers in the user's own passes, for as long as ``user`` lives."""

    def __init__(self, user: object) -> None:
        self._handles: list[Any] = []
        weakref.finalize(user, _remove, self._handles)

    def hook(self, layer: nn.Module, call: Callable[..., None]) -> None:
        """Have ``call(module, args, output)`` called after each forward pass of the layer."""
        self._handles.append(layer.register_forward_hook(_Hook(call)))

    @property
    def blind(self) -> bool:
        """Whether this is not a pass to be seen: paused, or traced by something that tensors must not leave."""
        tracing = torch.compiler.is_compiling() or torch.jit.is_tracing() or inside_functorch()
        return self.paused or tracing


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
