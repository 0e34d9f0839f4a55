"""Whether a sample uses a layer's weights at several positions, seen at the layer's first call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...model.block import Block
from ...model.layers import layer_of
from ..hooks import LayerHooks
from .inputs import inside_functorch


class PositionTap(LayerHooks):
    """Tells blocks that they are ``repeated``. It sees the optimizer's passes too, and each layer once."""

    def __init__(self, user: object) -> None:
        super().__init__(user)
        self._traced = False  # by torch.compile, which compiles anew where a hook is gone
        self.news = True  # whether a block has been told something, or has come, since someone took note

    def watch(self, blocks: Sequence[Block]) -> None:
        """See the layers of the blocks of which only a call can tell."""
        self.news = True
        for block in blocks:
            if block.layer is not None and block.repeated is None and min(block.shape) > 1:
                self.hook(block, partial(self._on_forward, block))

    def _on_forward(self, block: Block, module: nn.Module, args: tuple, output: Any) -> None:
        if torch.compiler.is_compiling():
            self._traced = True
            return
        if torch.jit.is_tracing() or inside_functorch() or block.repeated is not None:
            return
        if args and isinstance(args[0], Tensor):
            block.repeated, self.news = layer_of(module).repeated(args[0]), True
            if not self._traced:
                self.unwatch([block])
