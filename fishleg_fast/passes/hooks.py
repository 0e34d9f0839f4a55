"""Forward hooks that stay with one optimizer: neither copies of the model nor its pickles carry them on."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..model.block import Block
from .taps.inputs import Pausable, inside_functorch


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


class UnitHook:
    """A forward pre-hook of the optimizer's own: comes before the user's, and stays where these are left out."""

    def __init__(self, call: Callable[[nn.Module, tuple], None]) -> None:
        self.call = call

    def __call__(self, module: nn.Module, args: tuple) -> None:
        self.call(module, args)


def _is_users(hook: Any) -> bool:
    owner = type(getattr(hook, "__self__", None)).__module__
    return not isinstance(hook, UnitHook) and not owner.startswith("torch.distributed.fsdp")


@contextmanager
def before_users(module: nn.Module, call: Callable[[nn.Module, tuple], None]) -> Iterator[None]:
    """``call(module, args)`` before each pass of a module that was given to ``fully_shard``: after that one's own hook,
    which has parameters whole, and before the user's, which may read them.
    """
    hooks = module._forward_pre_hooks
    before = list(hooks)
    handle = module.register_forward_pre_hook(UnitHook(call))
    for key in before:
        if _is_users(hooks[key]):
            hooks[key] = hooks.pop(key)
    try:
        yield
    finally:
        handle.remove()
        for key in before:
            if key in hooks:
                hooks[key] = hooks.pop(key)


@contextmanager
def only_units_hooks(module: nn.Module) -> Iterator[None]:
    """Without the user's own forward pre-hooks, which what was seen at the module's forward is past."""
    whole = module._forward_pre_hooks
    kept = OrderedDict((key, hook) for key, hook in whole.items() if not _is_users(hook))
    module._forward_pre_hooks = kept
    try:
        yield
    finally:
        module._forward_pre_hooks = whole


class LayerHooks(Pausable):
    """Sees forward passes of blocks' layers in the user's own passes, for as long as ``user`` lives."""

    def __init__(self, user: object) -> None:
        super().__init__()
        self._handles: dict[int, Any] = {}  # by id of the block, which the hook keeps
        weakref.finalize(user, _remove, self._handles)

    def hook(self, block: Block, call: Callable[..., None]) -> None:
        """Have ``call(module, args, output)`` called after each pass of the block's layer, before others' hooks."""
        assert block.layer is not None
        self._handles[id(block)] = block.layer.register_forward_hook(_Hook(call), prepend=True)

    def unwatch(self, blocks: Sequence[Block]) -> None:
        """See no more of these blocks' layers."""
        for block in blocks:
            handle = self._handles.pop(id(block), None)
            if handle is not None:
                handle.remove()

    @property
    def blind(self) -> bool:
        """Whether this is not a pass to be seen: paused, or traced by something that tensors must not leave."""
        tracing = torch.compiler.is_compiling() or torch.jit.is_tracing() or inside_functorch()
        return tracing or self.paused  # a trace is not to depend on the latter


def _remove(handles: dict[int, Any]) -> None:
    for handle in handles.values():
        handle.remove()
