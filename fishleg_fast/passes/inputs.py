"""A batch of inputs: nested tensors, what the model is called with, and parts of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
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


def graph_leaf(tensor: Tensor, like: Tensor) -> Tensor:
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
        return self.map(lambda t: graph_leaf(t[start:stop], t) if t.ndim else t)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Inputs:
        args, kwargs, x = tree_map(fn, self._tree())
        return Inputs(args, kwargs, x, self.autocast, self.tapped)

    def copied(self) -> Inputs:
        """Apart from the graph and the memory of the user's tensors: a model may write to its inputs."""
        return self.map(lambda t: graph_leaf(t.detach().clone(), t))
