"""A batch of inputs: nested tensors, what the model is called with, and parts of a batch."""

from __future__ import annotations

import copy
import math
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

Shapes = tuple[tuple[int, ...], ...]
Memo = dict[int, tuple[Any, Any]]  # by id: an object, and what stands for it


def tree_map(fn: Callable[[Tensor], Any], tree: Any, memo: Memo | None = None) -> Any:
    """``fn`` on every tensor of nested tuples, lists and mappings, whose types are kept.

    What has been met before, or is in ``memo``, is replaced by the same object again. What cannot be rebuilt stays as
    it is.
    """
    memo = {} if memo is None else memo
    traced = torch.compiler.is_compiling()  # the trace would hold for these very objects alone, whose ids it has met
    if not traced and id(tree) in memo:
        return memo[id(tree)][1]
    new = tree
    if isinstance(tree, Tensor):
        new = fn(tree)
    elif isinstance(tree, PackedSequence):  # one whole: its lengths belong to its data
        pass
    elif isinstance(tree, Mapping):
        new = _mapping_like(tree, {key: tree_map(fn, value, memo) for key, value in tree.items()})
    elif isinstance(tree, (tuple, list)):
        new = _sequence_like(tree, [tree_map(fn, x, memo) for x in tree])
    if not traced:
        memo[id(tree)] = tree, new
    return new


def _mapping_like(tree: Mapping, items: dict[Any, Any]) -> Any:
    if type(tree) is dict:
        return items
    try:
        if all(tree[key] is value for key, value in items.items()):
            return tree
        if isinstance(tree, (dict, UserDict)):  # a copy has memory of its own
            new: Any = copy.copy(tree)
            for key, value in items.items():
                new[key] = value
        else:
            new = type(tree)(items)  # type: ignore[call-arg]
        return new if new is not tree and all(new[key] is value for key, value in items.items()) else tree
    except Exception:  # whatever a class of the user's raises: it is used as it is
        return tree


def _sequence_like(tree: Sequence, items: list[Any]) -> Any:
    if type(tree) is list:
        return items
    if type(tree) is tuple:  # torch.compile knows no identity of tuples
        return tuple(items)
    if all(a is b for a, b in zip(tree, items, strict=True)):
        return tree
    try:
        if isinstance(tree, tuple):
            new: Any = tuple.__new__(type(tree), items)  # past constructors with arguments of their own
            if hasattr(tree, "__dict__"):
                new.__dict__.update(tree.__dict__)
        else:
            new = copy.copy(tree)
            new[:] = items
        return new if new is not tree and len(new) == len(items) else tree
    except Exception:
        return tree


def graph_leaf(tensor: Tensor, like: Tensor) -> Tensor:
    """Off the graph, but differentiable where ``like`` is: some models differentiate by their inputs."""
    return tensor.detach().requires_grad_(like.requires_grad)


def own_leaf(tensor: Tensor) -> Tensor:
    """A copy off the graph; the tensor itself where its kind has none."""
    try:
        return graph_leaf(tensor.detach().clone(), tensor)
    except (RuntimeError, TypeError):
        return tensor


def seen_leaf(tensor: Tensor) -> Tensor:
    """The user's tensor off the graph; itself where its kind cannot be."""
    try:
        return graph_leaf(tensor, tensor)
    except (RuntimeError, TypeError):
        return tensor


def output_tensors(outputs: Any) -> list[Tensor]:
    """All tensors in what a model returned, the logits first."""
    found: list[Tensor] = []
    first = getattr(outputs, "logits", None)
    if isinstance(first, Tensor):
        found.append(first)
    _collect_tensors(outputs, found)
    return found


def output_shapes(outputs: Any) -> Shapes:
    """The shapes of all tensors in what a model returned, that of the logits first."""
    return tuple(map(shape_of, (outputs,) if isinstance(outputs, Tensor) else output_tensors(outputs)))


def _collect_tensors(tree: Any, found: list[Tensor]) -> None:
    if isinstance(tree, Tensor):
        found.append(tree)
    elif isinstance(tree, Mapping):
        for x in tree.values():
            _collect_tensors(x, found)
    elif isinstance(tree, (tuple, list)):
        for x in tree:
            _collect_tensors(x, found)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Its shape; () where it has none, as nested tensors have."""
    return () if tensor.is_nested else tuple(tensor.shape)


def is_array(x: Any) -> bool:
    """Whether this is NumPy's, or like it."""
    return hasattr(type(x), "__array_interface__") and hasattr(x, "copy") and hasattr(x, "shape")


_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, Enum, type, nn.Module)


def _collect_leaves(tree: Any, samples: int | None, found: dict[int, Any]) -> None:
    if isinstance(tree, _CONSTANTS):
        return
    if isinstance(tree, Mapping):
        items: Iterable[Any] = tree.values()
    elif isinstance(tree, (tuple, list)) and not isinstance(tree, PackedSequence):
        plain = all(isinstance(x, _CONSTANTS) for x in tree)
        rows = len(tree) == samples and not all(isinstance(x, Tensor) and shape_of(x)[:1] == (samples,) for x in tree)
        if rows or (plain and tree):
            found[id(tree)] = tree
            return
        items = tree
    else:
        found[id(tree)] = tree
        return
    for x in items:
        _collect_leaves(x, samples, found)


def version(tensor: Tensor) -> int:
    """Raised by every write that autograd knows of."""
    return 0 if tensor.is_inference() else tensor._version


class Writes:
    """Whether a model writes to its inputs in place, so that it has to be given copies, or what it was given has to be
    copied before. Of its first call that is not known, and so these are copied too.
    """

    def __init__(self) -> None:
        self.seen, self.expected = False, True

    def look(self, tensors: Sequence[Tensor], versions: Sequence[int]) -> None:
        """After a call of the model: the ``versions`` of what it was given are those from before that."""
        self.seen = self.expected = self.seen or [*map(version, tensors)] != versions


class EmptyBatch(ValueError):
    """A batch for the curvature has no samples."""


@dataclass
class Inputs:
    """A batch: what the model is called with, ``model(*args, **kwargs)``, and the x of a user's nll(model, x, y).

    ``autocast`` is the dtype of autocast, if that was on. ``tapped``: seen at the model's forward, past its hooks, and
    ``outputs`` are the shapes of what that returned. ``samples``: how many the batch has, where that is known, and
    ``over_batch`` what of it runs over them, if it may be cut (``passes/batch_rule.py`` finds out); ``part``: it was.
    ``mask``: the positions of the outputs that count in the loss, batch first, where not all do. ``targets``: what was
    trained on, where that is known.
    """

    args: tuple
    kwargs: dict[str, Any]
    x: Any
    autocast: torch.dtype | None = None
    tapped: bool = False
    outputs: Shapes | None = None
    samples: int | None = None
    over_batch: tuple[Any, ...] = ()
    part: bool = False
    mask: Tensor | None = None
    targets: Tensor | None = None

    @classmethod
    def of(cls, x: Any) -> Inputs:
        """From a loader's x: a tuple or list is spread over positional arguments, a mapping over named ones."""
        if isinstance(x, Mapping):
            return cls((), dict(x), x)
        plain = isinstance(x, (tuple, list)) and not hasattr(x, "_fields")
        return cls(tuple(x) if plain else (x,), {}, x)

    def leaves(self, samples: int | None = None) -> list[Any]:
        """What the batch consists of, each once: tensors, arrays, sequences of constants, objects; no constants. A
        sequence of so many ``samples`` is one of them too, unless it is of tensors that have as many rows.
        """
        found: dict[int, Any] = {}
        for tree in (self.args, self.kwargs, self.x):
            _collect_leaves(tree, samples, found)
        return list(found.values())

    def objects(self) -> list[Any]:
        """Those that nobody here knows to copy, each once."""
        return [x for x in self.leaves() if not (isinstance(x, (Tensor, list, tuple)) or is_array(x))]

    @property
    def empty(self) -> bool:
        """Whether there is nothing in any of its tensors, or in what the model made of them."""
        tensors = [x for x in self.leaves() if isinstance(x, Tensor)]
        nothing = bool(tensors) and not any(x.numel() for x in tensors)
        return nothing or (bool(self.outputs) and not any(math.prod(shape) for shape in self.outputs or ()))

    def size(self) -> int:
        """How many samples ``rows`` can tell apart: 1 where the batch stays whole."""
        return self.samples if self.over_batch and self.samples is not None else 1

    def rows(self, start: int, stop: int) -> Inputs:
        """Samples start … stop−1 where the batch may be cut, else the whole batch."""
        if not self.over_batch or self.samples is None or (start <= 0 and stop >= self.samples):
            return self
        memo: Memo = {id(x): (x, _rows_of(x, start, stop)) for x in self.over_batch}
        cut = self.map(lambda t: t, memo)
        mask, targets = (_positions_of(t, self.samples, start, stop) for t in (self.mask, self.targets))
        size = min(stop, self.samples) - start
        return replace(cut, samples=size, part=True, outputs=None, mask=mask, targets=targets)

    def map(self, fn: Callable[[Tensor], Any], memo: Memo | None = None) -> Inputs:
        """The same batch with ``fn`` of each tensor."""
        memo = {} if memo is None else memo
        args, kwargs, x = (tree_map(fn, tree, memo) for tree in (self.args, self.kwargs, self.x))
        over_batch = tuple(memo[id(leaf)][1] if id(leaf) in memo else leaf for leaf in self.over_batch)
        known = self.autocast, self.tapped, self.outputs, self.samples
        return Inputs(args, kwargs, x, *known, over_batch, self.part, self.mask, self.targets)

    def copied(self) -> Inputs:
        """Apart from the graph and the memory of the user's tensors: a model may write to its inputs."""
        memo: Memo = {id(x): (x, x.copy()) for x in self.leaves() if is_array(x)}
        return self.map(own_leaf, memo)


def _positions_of(t: Tensor | None, samples: int, start: int, stop: int) -> Tensor | None:
    """Of what goes with outputs, whose samples may be several in their first dimension."""
    if t is None:
        return None
    each = t.shape[0] // samples
    return t[start * each : stop * each]


def _rows_of(leaf: Any, start: int, stop: int) -> Any:
    """Of a tensor, an array or a sequence."""
    rows = leaf[start:stop]
    return graph_leaf(rows, leaf) if isinstance(leaf, Tensor) else rows
