"""Kronecker factors of the Fisher matrix, from passes with labels drawn from the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

from torch import Tensor

from ..algebra.maths import Aux
from ..model.block import Block
from ..passes.inputs import Inputs
from ..passes.isolated import IsolatedPasses
from .layer_check import check_layers
from .layer_pass import LayerPass, Share
from .products import gradients

CHUNKS, CHUNK_LEAST = 8, 16  # where a block's second moments need several gradients: how many, of how many samples


def moments(passes: IsolatedPasses, blocks: Sequence[Block], inputs: Inputs, take: Callable[[Share], None]) -> float:
    """Hand ``take`` what tells each block's second moments on drawn labels, as its structure averages them. Returns how
    many independent terms the batch's loss is the mean of.

    A layer's inputs and output gradients where a pass shows them and they make the block's gradient, else moments from
    several gradients of the block.
    """
    check_layers(passes, blocks, inputs)
    told = [b for b in blocks if b.structure.moments]
    wrong = [b for b in told if b.layer_agrees is False]
    layers = LayerPass([b for b in told if b.layer_agrees is not False], take, of_unseen=len(chunks_of(inputs)) == 2)
    terms = passes.run(inputs, passes.seed(), partial(layers.run, passes, inputs))
    rest = [*layers.hidden, *wrong]
    if layers.of_unseen and layers.unseen:
        found = [b.structure.gradient_moments([_gradient_of(b, layers.gradients, terms)]) for b in layers.unseen]
        take(Share(layers.unseen, found))
    elif layers.unseen:
        rest = [*layers.unseen, *rest]
    if rest:
        take(Share(rest, _gradient_moments(passes, rest, inputs)))
    return terms


def chunks_of(inputs: Inputs, agreed: Callable[[int], int] = int) -> list[int]:
    """The samples that parts of the batch begin with, and how many there are: as many gradients as there are parts make
    moments where no layer shows them. ``agreed``: how many parts, of how many there might be.
    """
    size = inputs.size()
    chunks = agreed(max(1, min(CHUNKS, size // CHUNK_LEAST)))
    return [size * i // chunks for i in range(chunks + 1)]


def _gradient_of(block: Block, grads: Mapping[int, Tensor | None], count: float) -> Tensor:
    """The block's gradient as (m, n), such that E[vec(g) vec(g)ᵀ] = F."""
    found = [(part, grads.get(id(part.param))) for part in block.parts]
    return block.matrix([None if g is None else part.of(g) for part, g in found]) * count**0.5


def _gradient_moments(passes: IsolatedPasses, blocks: Sequence[Block], inputs: Inputs) -> list[Aux]:
    # All of them, as a user's own backward pass: torch's GroupNorm (2.13, channels_last)
    # crashes where its input needs no gradient.
    params = [p for p in passes.root.parameters() if p.requires_grad and p.numel()]
    samples: list[list[Tensor]] = [[] for _ in blocks]

    def gradient(chunk: Inputs) -> tuple[list[Tensor], int]:
        loss, count = passes.likelihood_loss(chunk)
        return gradients(loss, params), count

    for start, stop in pairwise(chunks_of(inputs)):
        chunk = inputs.rows(start, stop)
        tensors, count = passes.run(chunk, passes.seed(), partial(gradient, chunk))
        grads = dict(zip(map(id, params), tensors, strict=True))
        for block, mine in zip(blocks, samples, strict=True):
            mine.append(_gradient_of(block, grads, count))
    return [b.structure.gradient_moments(mine) for b, mine in zip(blocks, samples, strict=True)]
