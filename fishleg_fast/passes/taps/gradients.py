"""A layer's gradient as the low-rank product EᵀH that autograd made it from, seen during the user's own passes.

H are the layer's inputs and E its output gradients, a row a position. They stand for ``.grad`` only while that is what
one backward pass left there. Two checks tell, and where either fails the dense gradient is used: autograd's version
counter, which accumulation, clipping and every in-place operation raise (autograd's own too, where a layer was called
three times or more); and the product with a random vector, within the rounding of λ's dtype, which also sees what
passes the counter by: ``.data``, an all-reduce, ``GradScaler``, hooks on the weight, a penalty in the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...algebra.low_rank import LowRank
from ...backends.cpu.agreement import agreements
from ...model.block import Block
from ...model.layers import layer_of
from ..hooks import LayerHooks

AGREEMENT = 32  # of .grad and EᵀH on a random vector, in units of rounding


class LayerTap:
    """What one layer showed since the last step."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.probe: Tensor | None = None  # (n,)
        self.memory: Tensor | None = None
        self._pays: dict[int, bool] = {}  # the latest answer
        self.clear()

    def clear(self) -> None:
        """Forget everything seen."""
        self.seen: list[tuple[Tensor, Tensor]] = []  # (input, output gradient) of each call
        self.positions = 0
        self.backward: int | None = None  # the backward pass that they are from
        self.fresh = False  # it found no gradient to add to

    def pays(self, positions: int) -> bool:
        """Whether a low-rank gradient of so many positions is worth having."""
        if positions not in self._pays:
            self._pays = {positions: self.block.structure.low_rank_pays(positions)}
        return self._pays[positions]

    def on_gradient(self, x: Tensor, e: Tensor) -> None:
        """The layer's output gradient has arrived, for its input ``x``."""
        number = torch._C._current_graph_task_id()
        if number != self.backward:
            self.clear()
            self.backward = number
            self.fresh = all(part.param.grad is None for part in self.block.parts)
        self.positions += e.numel() // max(e.shape[-1], 1)
        if self.fresh and self.pays(self.positions):
            self.seen.append((x, e.detach()))
        else:
            self.seen, self.fresh = [], False

    def sides(self, grads: Sequence[Tensor | None]) -> tuple[Tensor, Tensor] | None:
        """E and H of which ``grads``, one a part and as autograd left them, may be the product; None where not."""
        block = self.block
        if not self.fresh or not self.seen or any(g is None or g._version or g.dtype != block.dtype for g in grads):
            return None
        assert block.layer is not None
        layer, alone = layer_of(block.layer), len(self.seen) == 1
        rows = [layer.rows(block, x, e, self._input_memory(x) if alone else None) for x, e in self.seen]
        known = [pair for pair in rows if pair is not None]
        if len(known) != len(rows):
            return None
        H, E = (torch.cat(side) if len(side) > 1 else side[0] for side in zip(*known, strict=True))
        if self.probe is None:
            self.probe = torch.randn(H.shape[1], generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(H)
        return E, H

    @torch.inference_mode(False)
    def _input_memory(self, x: Tensor) -> Tensor | None:
        """Memory for H, kept from step to step; None where the inputs are all of it."""
        if len(self.block.parts) == 1:
            return None
        shape = x.numel() // max(x.shape[-1], 1), self.block.shape[1]
        if self.memory is None or self.memory.shape != shape:
            self.memory = x.new_empty(shape)
        return self.memory


class GradientTap(LayerHooks):
    """The taps of all layers whose gradients may be low-rank."""

    def __init__(self, user: object) -> None:
        super().__init__(user)
        self._taps: dict[int, LayerTap] = {}  # by id of the block

    def watch(self, blocks: Sequence[Block]) -> None:
        """See the gradients of those of the blocks that may be low-rank.

        On a CPU: elsewhere the decision would make the host wait, and whether it pays is not known.
        """
        for block in blocks:
            layer, on_cpu = block.layer, block.momentum.device.type == "cpu"
            if (
                layer is not None
                and on_cpu
                and block.structure.keeps_low_rank
                and layer_of(layer).low_rank
                and min(block.shape)
            ):
                tap = self._taps[id(block)] = LayerTap(block)
                self.hook(block, partial(self._on_forward, tap))

    def unwatch(self, blocks: Sequence[Block]) -> None:
        super().unwatch(blocks)
        for block in blocks:
            self._taps.pop(id(block), None)

    def _on_forward(self, tap: LayerTap, module: nn.Module, args: tuple, output: Any) -> None:
        if self.blind or module is not tap.block.layer or not args:
            return
        x = args[0]
        if not (isinstance(x, Tensor) and isinstance(output, Tensor) and output.requires_grad):
            return
        if x.dtype != tap.block.dtype or output.dtype != x.dtype:
            return
        if tap.pays(x.numel() // max(x.shape[-1], 1)):
            output.register_hook(partial(self._on_backward, tap, x.detach()))

    def _on_backward(self, tap: LayerTap, x: Tensor, e: Tensor) -> None:
        if not self.paused:
            tap.on_gradient(x, e)

    def low_rank(self, blocks: Sequence[Block]) -> list[LowRank | None]:
        """Each block's gradient, in ``block.grads``, as a low-rank product where it is known to be one."""
        found: dict[int, tuple[list[Tensor], Tensor, Tensor, Tensor]] = {}
        for k, block in enumerate(blocks):
            tap = self._taps.get(id(block))
            sides = None if tap is None else tap.sides(block.grads)
            if tap is not None and tap.probe is not None and sides is not None:
                E, H = sides
                pieces = [g.reshape(E.shape[1], -1) for g in block.grads if g is not None]
                found[k] = pieces, E, H, tap.probe
        low_rank: list[LowRank | None] = [None] * len(blocks)
        checks = zip(found.items(), agreements(list(found.values())), strict=True)
        for (k, (_, E, H, _)), (size, difference, rows, square) in checks:
            # What rounding may add up to: of sums of products with random signs, and of sums that add up coherently.
            if size > 0 and difference <= AGREEMENT * torch.finfo(E.dtype).eps * (size + rows):
                low_rank[k] = LowRank(E, H, square=square)
        return low_rank

    def clear(self) -> None:
        """Free what was seen."""
        for tap in self._taps.values():
            tap.clear()
