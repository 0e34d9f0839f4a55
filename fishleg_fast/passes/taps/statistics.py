"""Second moments of layers' inputs and output gradients, from the user's own backward pass: no pass of the optimizer's.

They are those of the empirical Fisher matrix, with the labels trained on in the place of drawn ones, and of the loss as
the user scales it: up to a factor that nobody here knows. Each layer's are made as its gradient arrives, so that no two
layers' rows have to be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...algebra.maths import Aux
from ...algebra.structures.base import LayerStatistics
from ...model.block import Block
from ...model.layers import layer_of
from ..hooks import LayerHooks


class StatisticsTap(LayerHooks):
    """The taps of all layers that show what their blocks' moments are made of. It sees while it is ``open``."""

    def __init__(self, user: object) -> None:
        super().__init__(user)
        self.open = False
        self._moments: dict[int, Aux] = {}  # by id of the block: sums over calls of its layer
        self._calls: dict[int, int] = {}
        self._hidden: set[int] = set()  # blocks of whose layers a call was not seen as it is
        self._backward = -1  # the latest backward pass
        self.terms = 0
        self.leaves_out: Callable[[], bool] = lambda: False  # whether not all positions count in the user's loss
        self._masked = False

    def watch(self, blocks: Sequence[Block]) -> None:
        """See the layers of those of the blocks that have moments."""
        for block in blocks:
            if block.layer is not None and block.structure.moments:
                self.hook(block, partial(self._on_forward, block))

    def _on_forward(self, block: Block, module: nn.Module, args: tuple, output: Any) -> None:
        if self.blind or not self.open or module is not block.layer:
            return
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(partial(self._on_backward, block, args[0].detach()))
        elif torch.is_grad_enabled():
            self._hidden.add(id(block))

    @torch.no_grad()
    def _on_backward(self, block: Block, x: Tensor, e: Tensor) -> None:
        if not self.open or self.paused:
            return
        assert block.layer is not None
        layer = layer_of(block.layer)
        rows = layer.rows(block, x, e)
        if rows is None:
            self._hidden.add(id(block))
            return
        number = torch._C._current_graph_task_id()
        first = number != self._backward  # to see a backward pass: the nearest to the loss
        if first:
            self._backward, self._masked = number, self.leaves_out()
        if self._masked:
            rows = layer.contributing(block, *rows)
        if first:
            self.terms += rows[1].shape[0]
        found = layer.statistics(block, *rows, 1.0)
        moments = block.structure.layer_moments(*found) if isinstance(found, LayerStatistics) else found
        known = self._moments.get(id(block))
        if known is None:
            self._moments[id(block)] = moments
        else:
            for name, moment in moments.items():
                known[name].add_(moment)
        self._calls[id(block)] = self._calls.get(id(block), 0) + 1

    def take(self, blocks: Sequence[Block]) -> tuple[list[Aux | None], int]:
        """The moments of each block seen since the last call, a mean over its layer's calls, None where it hides; and
        over how many terms a loss is the mean, 0 where that is not seen: the rows of the layer next to it.
        """
        found: list[Aux | None] = []
        for block in blocks:
            moments = None if id(block) in self._hidden else self._moments.get(id(block))
            count = self._calls.get(id(block), 1)
            found.append(None if moments is None else {name: t / count for name, t in moments.items()})
        terms = self.terms
        self.clear()
        return found, terms

    def clear(self) -> None:
        """Free what was seen."""
        self._moments, self._calls, self._hidden, self.terms = {}, {}, set(), 0
