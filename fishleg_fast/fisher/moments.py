"""Kronecker factors of the Fisher matrix, from passes with labels drawn from the model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ..algebra.maths import Aux
from ..algebra.structures.base import LayerStatistics
from ..model.block import Block
from ..model.layers import layer_of
from ..passes.inputs import Inputs
from ..passes.isolated import IsolatedPasses
from .products import gradients

CHUNKS, CHUNK_LEAST = 8, 16  # where a block's second moments need several gradients: how many, of how many samples


def moments(passes: IsolatedPasses, blocks: Sequence[Block], inputs: Inputs) -> list[LayerStatistics | Aux]:
    """What tells each block's second moments on drawn labels, as its structure averages them, {} if it has none.

    Its layer's inputs and output gradients where a pass shows them, else moments from several gradients of the block.
    """
    wanted = [b for b in blocks if b.structure.moments]
    found: dict[int, LayerStatistics | Aux] = _layer_moments(passes, [b for b in wanted if b.layer is not None], inputs)
    rest = [b for b in wanted if id(b) not in found]
    if rest:
        found |= _gradient_moments(passes, rest, inputs)
    return [found.get(id(b), {}) for b in blocks]


def _layer_moments(passes: IsolatedPasses, blocks: Sequence[Block], inputs: Inputs) -> dict[int, LayerStatistics | Aux]:
    seen: list[tuple[Block, Tensor, Any]] = []  # a block, its layer's input, and where its output's gradient will be

    def watch(block: Block) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and output.requires_grad:
                seen.append(
                    (block, args[0].detach(), get_gradient_edge(output))
                )  # an edge outlives in-place activations

        assert block.layer is not None
        return block.layer.register_forward_hook(hook)

    def pass_() -> tuple[int, Sequence[Tensor | None]]:
        loss, count = passes.likelihood_loss(inputs)
        for handle in hooks:  # before the backward pass, in which checkpointed modules run once more
            handle.remove()
        edges = [edge for *_, edge in seen]
        return count, torch.autograd.grad(loss, edges, allow_unused=True) if edges else ()

    hooks = [watch(block) for block in blocks]
    try:
        count, output_gradients = passes.run(inputs, passes.seed(), pass_)
    finally:
        for handle in hooks:
            handle.remove()
    rows: dict[int, list[tuple[Tensor, Tensor]]] = {}
    unseen: set[int] = set()
    for (block, x, _), e in zip(seen, output_gradients, strict=True):
        assert block.layer is not None
        found = None if e is None else layer_of(block.layer).rows(block, x, e)
        if found is None:
            unseen.add(id(block))
        else:
            rows.setdefault(id(block), []).append(found)
    together: dict[int, LayerStatistics | Aux] = {}
    for block in blocks:
        if id(block) in rows and id(block) not in unseen:
            assert block.layer is not None
            a, e = (torch.cat(side) if len(side) > 1 else side[0] for side in zip(*rows[id(block)], strict=True))
            together[id(block)] = layer_of(block.layer).statistics(block, a, e, count)
    return together


def _gradient_moments(passes: IsolatedPasses, blocks: Sequence[Block], inputs: Inputs) -> dict[int, Aux]:
    # All of them, as a user's own backward pass: torch's GroupNorm (2.13, channels_last)
    # crashes where its input needs no gradient.
    params = [p for p in passes.root.parameters() if p.requires_grad and p.numel()]
    size = inputs.size()
    chunks = max(1, min(CHUNKS, size // CHUNK_LEAST))
    edges = [size * i // chunks for i in range(chunks + 1)]
    samples: list[list[Tensor]] = [[] for _ in blocks]

    def gradient(chunk: Inputs) -> tuple[list[Tensor], int]:
        loss, count = passes.likelihood_loss(chunk)
        return gradients(loss, params), count

    for start, stop in pairwise(edges):
        chunk = inputs.rows(start, stop)
        tensors, count = passes.run(chunk, passes.seed(), partial(gradient, chunk))
        grads = dict(zip(map(id, params), tensors, strict=True))
        for block, mine in zip(blocks, samples, strict=True):
            found = [(part, grads.get(id(part.param))) for part in block.parts]
            mine.append(block.matrix([None if g is None else part.of(g) for part, g in found]) * count**0.5)
    return {id(b): b.structure.gradient_moments(mine) for b, mine in zip(blocks, samples, strict=True)}
