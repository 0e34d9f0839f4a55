"""Fisher-vector products of low-rank vectors: J v and Jᵀ by what the layers show, without a matrix of a layer's size.

A Linear whose v is EᵀH adds x vᵀ = (x Hᵀ) E to its output's tangent, and its part of F v is the low-rank product of its
output gradients and its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ..algebra.low_rank import LowRank
from ..algebra.matrix import dot
from ..model.block import Block
from ..model.layers import layer_of
from ..passes.inputs import Inputs
from ..passes.isolated import IsolatedPasses
from .products import (
    Found,
    WrongDerivative,
    again_if_checkpointed,
    check_tangent,
    forward_mode_product,
    linearized_ggn,
)


class LowRankTangents:
    """Layers whose parameters have low-rank tangents, during one forward pass within ``forward_ad.dual_level()``."""

    def __init__(self, blocks: Sequence[Block], vs: Sequence[LowRank]) -> None:
        self.blocks, self._vs = blocks, vs
        self._handles: list[Any] = []
        self.clear()

    def clear(self) -> None:
        """Forget everything seen."""
        self._seen: list[tuple[int, Tensor, Any]] = []  # block, its layer's input, where its output's gradient will be
        self.all_seen = False  # what follows is a checkpointed module's second time, in the backward pass
        self._hidden = False  # whether some call did not show what it does

    def __enter__(self) -> LowRankTangents:
        for k, block in enumerate(self.blocks):
            assert block.layer is not None
            # Before the user's own hooks: these see the layer's output, tangent included.
            self._handles.append(block.layer.register_forward_hook(self._hook(k), prepend=True))
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """No call from here on is theirs."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, k: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            rows = None
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and output.requires_grad:
                x = forward_ad.unpack_dual(args[0]).primal.detach()
                rows = layer_of(module).rows(self.blocks[k], x, output.detach())
            if rows is None:  # a named argument, or a reentrant checkpoint, in which gradients are disabled
                self._hidden = True
                return output
            v = self._vs[k].to(x.dtype)
            tangent = ((rows[0] @ v.H.T) @ v.E).reshape(output.shape)
            moved = output + forward_ad.make_dual(torch.zeros_like(tangent), tangent)
            if not self.all_seen:
                self._seen.append((k, x, get_gradient_edge(moved)))
            return moved

        return hook

    def edges(self) -> list[Any]:
        """Where the gradients of the outputs seen are to be had."""
        return [edge for *_, edge in self._seen]

    def products(self, gradients: Sequence[Tensor]) -> list[LowRank] | None:
        """Jᵀ of each block, from the gradients at ``edges()``; None where a call of a layer was not seen, or nothing
        depends on any.
        """
        if self._hidden or len(gradients) < len(self._seen):
            return None
        rows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.blocks]
        for (k, x, _), e in zip(self._seen, gradients, strict=True):
            block = self.blocks[k]
            assert block.layer is not None
            found = layer_of(block.layer).rows(block, x, e)
            if found is not None:
                a, e = found
                rows[k].append((a.to(block.dtype), e.to(block.dtype)))  # as v is, whatever autocast was on
        if not all(rows):
            return None
        sides = [[torch.cat(side) if len(side) > 1 else side[0] for side in zip(*pairs, strict=True)] for pairs in rows]
        return [LowRank(E, H) for H, E in sides]


def low_rank_ggn(
    passes: IsolatedPasses,
    params: Sequence[Tensor],
    vs: Sequence[Tensor],
    blocks: Sequence[Block],
    low_rank_vs: Sequence[LowRank],
    inputs: Inputs,
) -> tuple[list[Tensor], list[LowRank]] | None:
    """``ggn`` with a low-rank v for the layers of ``blocks``, and dense ones for the ``params`` of others: F v of both.

    None where the model does not lend itself to it: its operations lack forward derivatives, or a layer hides. The
    generator of seeds is then as it was.
    """
    layers, before = LowRankTangents(blocks, low_rank_vs), passes.generator.get_state()

    def linearize(
        passes: IsolatedPasses,
        mine: Sequence[tuple[Tensor, Tensor]],
        inputs: Inputs,
        then: Callable[[Tensor, Tensor | None], Found],
    ) -> Found:
        def after(output: Tensor, tangent: Tensor | None) -> Found:
            layers.all_seen = True
            if not passes.checkpointed:
                layers.remove()
            return then(output, tangent)

        with layers:
            return forward_mode_product(passes, mine, inputs, after)

    def check(
        w: Tensor,
        tangent: Tensor | None,
        mine: Sequence[tuple[Tensor, Tensor]],
        pulled: Sequence[Tensor],
        autocast: torch.dtype | None,
    ) -> None:
        found = layers.products(pulled[len(mine) :])
        if found is not None:
            others = [dot(x, v) for x, v in zip(found, low_rank_vs, strict=True)]
            check_tangent(w, tangent, mine, pulled[: len(mine)], autocast, others)

    seed, due = passes.seed(), passes.attempts("ggn", "low rank").check_due(passes.mode())

    def product() -> Found:
        layers.clear()
        return passes.run(
            inputs,
            seed,
            lambda: linearized_ggn(passes, params, vs, inputs, linearize, layers.edges, check if due else None),
            twice=True,
        )

    try:
        products, gradients = again_if_checkpointed(passes, product)
    except torch.OutOfMemoryError:
        raise
    except WrongDerivative:
        passes.attempts("ggn", "low rank").rule_out()
        found = None
    except RuntimeError:  # the dense product meets it again, and says what it is
        found = None
    else:
        found = layers.products(gradients)
    if found is None:
        passes.generator.set_state(before)
        return None
    return products, found
