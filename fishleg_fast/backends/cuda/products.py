"""Cached products, Q u and inner products over lists of blocks by the CUDA kernels."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from ...algebra.maths import Applications
from ...algebra.matrix import Matrix, dot
from ...model.block import Block
from ...model.gradients import GradientInPlace
from .. import reference
from .coverage import ALIGNED, TYPES, BlockFacts, why_uncovered
from .plans import GradientViews, Op, Plan
from .runtime import runtime
from .state import facts_of, plan_of


def refresh(blocks: Sequence[Block], applications: Sequence[Applications] | None = None) -> None:
    """Bring every block's cached products (P and S) up to date with its λ. Reading them does so too.

    ``applications`` as the protocol has them, for uncovered blocks; of the others both products are always formed.
    """
    counts: Sequence[Applications] = applications or [None] * len(blocks)
    ours, facts = [], []
    for block, count in zip(blocks, counts, strict=True):
        found = facts_of(block)
        if why_uncovered(found) is not None:
            block.structure.refresh(count)
        else:
            ours.append(block)
            facts.append(found)
    _form(ours, facts)


def _form(blocks: Sequence[Block], facts: Sequence[BlockFacts]) -> None:
    """P and S of covered blocks, where they are not today's."""
    stale = [
        k for k, (b, f) in enumerate(zip(blocks, facts, strict=True)) if f.kronecker and not b.structure.holds("P", "S")
    ]
    if not stale:
        return
    ours = [blocks[k] for k in stale]
    plan = plan_of(Op.REFRESH, ours, [facts[k] for k in stale], [None] * len(ours))
    caches = []
    for block in ours:
        aux = block.structure.fishleg_aux
        cache = block.structure.cache_memory(ALIGNED, P=aux["R"], S=aux["L"])
        plan.point(aux["R"], aux["L"])
        for product in (cache["P"], cache["S"]):
            plan.pointers += (product.data_ptr(), max(product.stride(0), product.shape[0]))
        caches.append(cache)
    plan.native.refresh(plan.stream, plan.lists[0])
    plan.begin()
    for block, cache in zip(ours, caches, strict=True):
        block.structure.adopt(cache)


def prepare(
    op: Op,
    blocks: Sequence[Block],
    us: Sequence[Matrix],
    vs: Sequence[Matrix | None] | None = None,
    flat: Sequence[bool] = (),
) -> tuple[Plan | None, list[BlockFacts], list[GradientViews | None]]:
    """A plan, with P and S formed, and where each u is, None for a block not covered; no plan where none is.

    ``flat``: of which blocks a θ step takes polar factors.
    """
    facts = [facts_of(b) for b in blocks]
    views: list[GradientViews | None] = []
    for block, found, u, v in zip(blocks, facts, us, vs or [None] * len(blocks), strict=True):
        covered = why_uncovered(found, u, v, learning=op is Op.LAMBDA) is None
        views.append(GradientViews(block, found, u) if covered else None)
    inside = [k for k, view in enumerate(views) if view is not None]
    if not inside:
        return None, facts, views
    _form([blocks[k] for k in inside], [facts[k] for k in inside])
    return plan_of(op, blocks, facts, views, flat), facts, views


def qv(blocks: Sequence[Block], us: Sequence[Matrix]) -> list[Matrix]:
    """Q u for each block, low-rank where u is (which ``structure.keeps_low_rank`` has to allow)."""
    plan, facts, views = prepare(Op.QV, blocks, us)
    outs: list[Matrix] = []
    for block, found, view, u in zip(blocks, facts, views, us, strict=True):
        if plan is None or view is None:
            outs.append(reference.qv([block], [u])[0])
            continue
        out = torch.empty(block.shape, dtype=torch.float32, device=block.momentum.device)
        plan.pointers += found.operator(block)
        plan.point(found.outer(block), out)
        plan.take(view)
        outs.append(out)
    if plan is not None:
        plan.native.qv(plan.stream, plan.workspace.data_ptr(), plan.lists[0])
        plan.begin()
    return outs


def inner(xs: Sequence[Matrix], ys: Sequence[Matrix]) -> Tensor:
    """⟨x, y⟩ over all blocks together: a scalar, float64 where any block is."""
    pairs: list[tuple[Tensor, Tensor]] = []
    others: list[Tensor] = []
    for x, y in zip(xs, ys, strict=True):
        found = _pairs(x, y)
        if found is None:
            others.append(dot(x, y))
        else:
            pairs += found
    if not pairs or any(t.dtype == torch.float64 for t in others):
        return reference.inner(xs, ys)
    device, (extension, _, stream) = pairs[0][0].device, runtime()
    entries = extension.cuda_tile_entries
    tiles = sum(-(-x.numel() // entries) for x, _ in pairs)
    sums = torch.zeros if others else torch.empty
    partial_sums = sums(tiles + len(others), 3, dtype=torch.float64, device=device)
    if others:
        partial_sums[tiles:, 0] = torch.stack([t.to(device, torch.float64) for t in others])
    out = torch.empty((), dtype=torch.float32, device=device)
    flat = [t for pair in pairs for t in pair]
    extension.cuda_inner(
        device.index or 0,
        stream(device),
        array("q", [t.data_ptr() for t in flat]),
        array("q", [x.numel() for x, _ in pairs]),
        array("q", [TYPES[t.dtype] for t in flat]),
        partial_sums.data_ptr(),
        len(others),
        out.data_ptr(),
    )
    return out


def _pairs(x: Matrix, y: Matrix) -> list[tuple[Tensor, Tensor]] | None:
    """Pieces of x and y that lie alike, without gaps; None where there are none."""
    if isinstance(x, GradientInPlace) and isinstance(y, GradientInPlace):
        if x.block is not y.block or x.scale is not None or y.scale is not None:
            return None
        found = [(g, g) for g in x.block.grads if g is not None]
    elif isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and x.device == y.device:
        found = [(x, y)]
    else:
        return None
    kind = runtime().kind
    fit = all(t.is_contiguous() and t.dtype in TYPES and t.device.type == kind for pair in found for t in pair)
    return found if fit else None
