"""Kronecker factors of the Fisher matrix, from passes with labels drawn from the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def moments(
    passes: IsolatedPasses, blocks: Sequence[Block], inputs: Inputs
) -> tuple[list[LayerStatistics | Aux], float]:
    """What tells each block's second moments on drawn labels, as its structure averages them, {} if it has none; and
    how many independent terms the batch's loss is the mean of.

    Its layer's inputs and output gradients where a pass shows them, else moments from several gradients of the block.
    """
    wanted = [b for b in blocks if b.structure.moments]
    found, terms = _layer_moments(passes, wanted, inputs)
    rest = [b for b in wanted if id(b) not in found]
    if rest:
        found |= _gradient_moments(passes, rest, inputs)
    return [found.get(id(b), {}) for b in blocks], terms


def _chunks(inputs: Inputs) -> int:
    """How many gradients, of as many parts of the batch, make moments where no layer shows them."""
    return max(1, min(CHUNKS, inputs.size() // CHUNK_LEAST))


def _gradient_of(block: Block, grads: Mapping[int, Tensor | None], count: float) -> Tensor:
    """The block's gradient as (m, n), such that E[vec(g) vec(g)ᵀ] = F."""
    found = [(part, grads.get(id(part.param))) for part in block.parts]
    return block.matrix([None if g is None else part.of(g) for part, g in found]) * count**0.5


Seen = tuple[Block, Tensor, Any]  # a block, its layer's input, and where its output's gradient will be


def _watch(block: Block, seen: list[Seen]) -> Any:
    """Add each call of the block's layer to what is seen; returns the hook's handle."""

    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and output.requires_grad:
            # an edge outlives in-place activations
            seen.append((block, args[0].detach(), get_gradient_edge(output)))

    assert block.layer is not None
    return block.layer.register_forward_hook(hook)


def _layer_moments(
    passes: IsolatedPasses, blocks: Sequence[Block], inputs: Inputs
) -> tuple[dict[int, LayerStatistics | Aux], float]:
    """What one pass over the whole batch shows; if one gradient is to do for blocks without a layer, that too."""
    seen: list[Seen] = []
    by_gradient: dict[int, LayerStatistics | Aux] = {}

    def pass_() -> tuple[int, Sequence[Tensor | None]]:
        loss, count = passes.likelihood_loss(inputs)
        for handle in hooks:  # before the backward pass, in which checkpointed modules run once more
            handle.remove()
        shown = {id(block) for block, *_ in seen}
        hidden = [b for b in blocks if id(b) not in shown] if _chunks(inputs) == 1 else []
        params = {id(part.param): part.param for b in hidden for part in b.parts if part.param.requires_grad}
        wanted = [*(edge for *_, edge in seen), *params.values()]
        found = torch.autograd.grad(loss, wanted, allow_unused=True) if wanted else ()
        grads = dict(zip(params, found[len(seen) :], strict=True))
        by_gradient.update({id(b): b.structure.gradient_moments([_gradient_of(b, grads, count)]) for b in hidden})
        return count, found[: len(seen)]

    hooks = [_watch(block, seen) for block in blocks if block.layer is not None]
    try:
        count, output_gradients = passes.run(inputs, passes.seed(), pass_)
    finally:
        for handle in hooks:
            handle.remove()
    return by_gradient | _of_rows(blocks, seen, output_gradients, count), count


def _of_rows(
    blocks: Sequence[Block], seen: Sequence[Seen], output_gradients: Sequence[Tensor | None], count: float
) -> dict[int, LayerStatistics | Aux]:
    """The statistics of blocks whose layer showed all its calls."""
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
    size, chunks = inputs.size(), _chunks(inputs)
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
            mine.append(_gradient_of(block, grads, count))
    return {id(b): b.structure.gradient_moments(mine) for b, mine in zip(blocks, samples, strict=True)}
