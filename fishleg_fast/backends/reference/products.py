"""Cached products, Q u and inner products over lists of blocks, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...algebra.low_rank import LowRank
from ...algebra.maths import Applications
from ...algebra.matrix import Matrix, dense, dot
from ...algebra.stacks import alike, scalars
from ...algebra.structures import stacked
from ...model.block import Block
from ...model.gradients import GradientInPlace
from ...model.stack import lies, matrices, stacks_of


def refresh(blocks: Sequence[Block], applications: Sequence[Applications] | None = None) -> None:
    """Each structure's own ``refresh``."""
    counts = applications or [None] * len(blocks)
    for stack in stacks_of(blocks, more=counts):
        stacked.refresh(stack.structures, counts[stack.numbers[0]])


def qv(blocks: Sequence[Block], us: Sequence[Matrix]) -> list[Matrix]:
    """Q u of each block."""
    found: list[Matrix] = list(us)
    for stack in stacks_of(blocks, us):
        block, u = stack.blocks[0], us[stack.numbers[0]]
        if isinstance(u, LowRank):
            found[stack.numbers[0]] = block.structure.low_rank_product(u)
            continue
        vs = stacked.product(stack.structures, stack.matrices(us)).unbind()
        for k, v in zip(stack.numbers, vs, strict=True):
            found[k] = v
    return found


def inner(xs: Sequence[Matrix], ys: Sequence[Matrix]) -> Tensor:
    """Σ ⟨x, y⟩."""
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if x is not y or isinstance(x, LowRank)]
    sums = []
    if len(pairs) < len(xs):
        sums.append(_squares([x for x, y in zip(xs, ys, strict=True) if x is y and not isinstance(x, LowRank)]))
    keys = [None if None in (lie := (lies(x), lies(y))) else lie for x, y in pairs]
    for group in alike(keys, [math.prod(x.shape) for x, _ in pairs]):
        left, right = ([pairs[k][side] for k in group] for side in (0, 1))
        if len(group) == 1:
            sums.append(dot(left[0], right[0]))
        else:
            sums.append(torch.sum(matrices(left) * matrices(right)))
    return scalars(sums).sum()


def _squares(xs: Sequence[Matrix]) -> Tensor:
    """Σ ‖x‖², of gradients where they are."""
    pieces: list[tuple[Tensor, Tensor | None]] = []
    for x in xs:
        if isinstance(x, GradientInPlace):
            pieces += [(g, x.scale) for g in x.block.grads if g is not None]
        else:
            pieces.append((dense(x), None))
    by_kind: dict[tuple, list[tuple[Tensor, Tensor | None]]] = {}
    for piece in pieces:
        by_kind.setdefault((piece[0].dtype, piece[0].device, piece[1] is None), []).append(piece)
    sums = []
    for (dtype, _, plain), mine in by_kind.items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        norms = scalars(torch._foreach_norm([t for t, _ in mine], 2, wide))
        factors = norms if plain else norms * scalars([c for _, c in mine if c is not None])
        sums.append(factors.square().sum())
    return scalars(sums).sum()


def common_dtype(things: Sequence[Tensor | Block]) -> torch.dtype:
    """float64 where anything is, float32 otherwise."""
    return torch.float64 if any(x.dtype == torch.float64 for x in things) else torch.float32
