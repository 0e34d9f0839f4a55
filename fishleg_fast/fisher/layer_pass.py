"""One pass with labels drawn from the model that shows layers' inputs and output gradients, a few layers' at a time.

What a layer showed is made use of and let go as soon as the backward pass has got to it: no two large layers' rows, nor
all layers' output gradients, are ever held together. Those of a convolution, its patches, are many times its input:
they are made of some samples at a time.

A layer in a checkpointed module keeps its input no more than training does: it is seen when the module runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from ..algebra.maths import Aux
from ..algebra.structures.base import LayerStatistics
from ..model.block import Block
from ..model.layers import layer_of
from ..passes.inputs import Inputs
from ..passes.isolated import IsolatedPasses

ENTRIES = 2**21  # of rows at a time


class Share(NamedTuple):
    """Of some blocks what tells their second moments; ``more``: after a first part of the batch, another one."""

    blocks: Sequence[Block]
    statistics: Sequence[LayerStatistics | Aux]
    more: bool = False


Shown = tuple[Tensor, Tensor]  # a layer's input and its output's gradient


class Call:
    """A layer's input in one call of it, where its output's gradient will be, and that gradient."""

    def __init__(self, x: Tensor | None, edge: GradientEdge) -> None:
        self.x, self.edge = x, edge  # x is to come where the call is checkpointed
        self.e: Tensor | None = None


class LayerPass:
    """A pass for the moments of blocks, whose layers' go to ``take``.

    After ``run``, ``unseen`` are blocks without a layer that showed a call, ``gradients`` those of their parameters by
    id, if ``of_unseen``, and ``hidden`` those whose layer did not show enough.
    """

    def __init__(self, blocks: Sequence[Block], take: Callable[[Share], None], of_unseen: bool) -> None:
        self._blocks, self._take, self.of_unseen = blocks, take, of_unseen
        self._calls: dict[int, list[Call]] = {}  # by id of the block, until its layer's have been made use of
        self._ready: list[tuple[Block, LayerStatistics | Aux]] = []
        self._entries = 0  # of what is ready
        self._terms, self._masked = 1.0, False
        self.unseen: list[Block] = []
        self.hidden: list[Block] = []
        self.gradients: dict[int, Tensor | None] = {}

    def run(self, passes: IsolatedPasses, inputs: Inputs) -> float:
        """The pass, which belongs inside ``passes.run``. Returns over how many terms its loss is the mean."""
        self._masked = inputs.mask is not None
        hooks = [  # before the user's, which may change the output
            b.layer.register_forward_hook(partial(self._on_forward, b), prepend=True) for b in self._blocks if b.layer
        ]
        try:
            loss, self._terms = passes.likelihood_loss(inputs)
        finally:  # before the backward pass, in which checkpointed modules run once more
            for hook in hooks:
                hook.remove()
        self.unseen = [b for b in self._blocks if id(b) not in self._calls]
        params = {id(p): p for p in self._wanted(passes) if p.requires_grad}
        calls = [(block, call) for block in self._blocks for call in self._calls.get(id(block), ())]
        hooks = [  # before the layers, of which the last to be run again is not run to its end
            block.layer.register_forward_pre_hook(partial(self._on_again, block), prepend=True)
            for block, call in calls
            if call.x is None and block.layer is not None
        ]
        try:
            with torch.autocast(passes.device.type, enabled=False):  # what is made of rows is as exact as λ
                self._backward(loss, calls, params)
        finally:
            for hook in hooks:
                hook.remove()
        return self._terms

    def _wanted(self, passes: IsolatedPasses) -> Iterable[Tensor]:
        """Whose gradients are wanted beside those of layers' outputs."""
        return [p for b in self.unseen for p in b.params] if self.of_unseen else []

    def _leaves(self, block: Block) -> Iterable[Tensor]:
        """What autograd is asked for so that a backward pass comes by the block's layer."""
        return block.params

    def _backward(self, loss: Tensor, calls: Sequence[tuple[Block, Call]], params: dict[int, Tensor]) -> None:
        ends = _ends([call.edge.node for _, call in calls])
        last, hooks = [], []  # autograd has to be asked for the former, and so comes by all others
        for block, call in calls:
            if call.edge.node in ends and call.x is not None:
                last.append((block, call))
                continue
            hooks.append(call.edge.node.register_prehook(partial(self._on_gradients, block, call)))
            if call.edge.node in ends:  # whose own backward step is what has the module run again
                params |= {id(p): p for p in self._leaves(block) if p.requires_grad}
        wanted: list[Any] = [*(call.edge for _, call in last), *params.values()]
        try:
            found = torch.autograd.grad(loss, wanted, allow_unused=True) if wanted else ()
        finally:  # a node and the call that its hook holds would keep each other
            for hook in hooks:
                hook.remove()
        self.gradients = dict(zip(params, found[len(last) :], strict=True))
        for (block, call), e in zip(last, found, strict=False):
            self._on_gradient(block, call, e)
        self._hand_over()
        self.hidden += [b for b in self._blocks if id(b) in self._calls]  # whose gradients did not all come
        self._calls.clear()

    def _on_forward(self, block: Block, module: nn.Module, args: tuple, output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and output.requires_grad:
            calls = self._calls.setdefault(id(block), [])
            x = None if not calls and _checkpointed() else args[0].detach()
            calls.append(Call(x, get_gradient_edge(output)))  # an edge outlives in-place activations

    def _on_again(self, block: Block, module: nn.Module, args: tuple) -> None:
        calls = self._calls.get(id(block), [])
        if len(calls) == 1 and calls[0].x is None and args and isinstance(args[0], Tensor):  # of several, which?
            calls[0].x = args[0].detach()
            self._on_shown(block)

    def _on_gradients(self, block: Block, call: Call, gradients: Sequence[Tensor | None]) -> None:
        self._on_gradient(block, call, gradients[call.edge.output_nr])

    def _on_gradient(self, block: Block, call: Call, e: Tensor | None) -> None:
        call.e = e
        self._on_shown(block)

    @torch.no_grad()
    def _on_shown(self, block: Block) -> None:
        """Make use of the block's layer once all of its calls are known."""
        calls = self._calls[id(block)]
        shown = [(c.x, c.e) for c in calls if c.x is not None and c.e is not None]
        if len(shown) == len(calls):
            del self._calls[id(block)]
            if not self._use(block, shown):
                self.hidden.append(block)
            for c in calls:  # autograd's hook holds the call until the pass is over
                c.x = c.e = None

    def _use(self, block: Block, calls: Sequence[Shown]) -> bool:
        """Make use of all calls of a layer; whether they show what is needed."""
        positions = sum(e.numel() for _, e in calls) // max(block.shape[0], 1)
        entries = positions * block.shape[1]
        shares = _in_parts(block, calls, self._terms, self._masked) if entries > ENTRIES else None
        if shares is not None:
            self._hand_over()  # ranks whose batches differ have all in one order
            for share in shares:
                self._take(share)
            return True
        found = _statistics(block, calls, self._terms, self._masked)
        if found is None:
            return False
        if self._entries + entries > ENTRIES:
            self._hand_over()
        self._ready.append((block, found))
        self._entries += entries
        return True

    def _hand_over(self) -> None:
        """Of small layers together, which costs the ops fewer calls."""
        if self._ready:
            self._take(Share([block for block, _ in self._ready], [found for _, found in self._ready]))
        self._ready, self._entries = [], 0


def _checkpointed() -> bool:
    """Whether what autograd saves now is not kept but computed again (torch.utils.checkpoint, use_reentrant=False)."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__qualname__", "").startswith("_checkpoint_hook.")


def _ends(nodes: Sequence[Node]) -> set[Node]:
    """Those of the nodes from which a backward pass gets to no other of them."""
    mine, passed = set(nodes), {}  # node -> whether one of mine is there or further on
    ends = set()
    for start in nodes:
        stack = [start]
        while stack:
            node = stack[-1]
            following = [n for n, _ in node.next_functions if n is not None]
            if node not in passed:
                passed[node] = False  # until those after it are known
                stack += [n for n in following if n not in passed]
                continue
            stack.pop()
            beyond = any(passed[n] for n in following)
            if node in mine and not beyond:
                ends.add(node)
            passed[node] = beyond or node in mine
    return ends


def _statistics(
    block: Block, calls: Sequence[Shown], terms: float, masked: bool = False
) -> LayerStatistics | Aux | None:
    """From all calls of the block's layer; None where they do not show its gradient."""
    assert block.layer is not None
    layer = layer_of(block.layer)
    rows = [layer.rows(block, x, e) for x, e in calls]
    if any(found is None for found in rows):
        return None
    if masked:
        rows = [layer.contributing(block, *found) for found in rows if found is not None]
    a, e = (torch.cat(side) if len(side) > 1 else side[0] for side in zip(*filter(None, rows), strict=True))
    return layer.statistics(block, a, e, terms)


def parts_of(block: Block, x: Tensor, e: Tensor) -> Iterator[Shown]:
    """A call's input and output gradient, of so many samples at a time as their rows allow."""
    assert block.layer is not None
    layer = layer_of(block.layer)
    rows = layer.rows(block, x[:1], e[:1]) if layer.separable(block.layer, x, e) else None
    if rows is not None:
        samples = max(1, ENTRIES // max(rows[0].numel(), 1))
        yield from zip(x.split(samples), e.split(samples), strict=True)
    else:
        yield x, e


def _in_parts(block: Block, calls: Sequence[Shown], terms: float, masked: bool) -> Iterator[Share] | None:
    """The same, of some samples at a time; None where that is impossible, or some numbers are not finite."""
    assert block.layer is not None
    layer = layer_of(block.layer)
    positions, parts = 0, list[Shown]()
    for x, e in calls:
        if not layer.separable(block.layer, x, e) or not torch.isfinite(x.sum() + e.sum()):
            return None
        rows = layer.rows(block, x[:1], e[:1])
        if rows is None or not isinstance(layer.statistics(block, *rows, terms), LayerStatistics):
            return None
        if masked:
            shown = layer.output_gradients(block.layer, e)
            positions += rows[0].shape[0] // rows[1].shape[0] * int(shown.any(1).sum())
        else:
            positions += rows[0].shape[0] * x.shape[0]
        parts += parts_of(block, x, e)

    def shares() -> Iterator[Share]:
        for k, (x, e) in enumerate(parts):
            rows = layer.rows(block, x, e)
            assert rows is not None
            if masked:
                rows = layer.contributing(block, *rows)
            found = layer.statistics(block, *rows, terms)
            assert isinstance(found, LayerStatistics)
            yield Share([block], [found._replace(positions=positions)], k > 0)

    return shares()
