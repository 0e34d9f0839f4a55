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
from .coverage import TYPES, why_uncovered
from .operators import operators_of
from .plans import Op
from .prepare import Prepared, launched
from .runtime import runtime
from .state import CudaState, facts_of


def refresh(blocks: Sequence[Block], applications: Sequence[Applications] | None = None) -> None:
    """Bring every block's cached products (P and S) up to date with its λ. Reading them does so too.

    ``applications`` as the protocol has them, for uncovered blocks; of the others both products are always formed.
    """
    if not blocks:
        return
    state = blocks[0].kept(CudaState)
    known = state.operators.get((True,) * len(blocks))
    if known is not None and known.watch.same(blocks):
        known.update(blocks)
        return
    facts = [facts_of(b) for b in blocks]
    covered = [why_uncovered(f) is None for f in facts]
    for block, count, mine in zip(blocks, applications or [None] * len(blocks), covered, strict=True):
        if not mine:
            block.structure.refresh(count)
    inside = [k for k, mine in enumerate(covered) if mine]
    if inside:
        ours = [blocks[k] for k in inside]
        operators_of(state, covered, ours, [facts[k] for k in inside]).update(ours)


def qv(blocks: Sequence[Block], us: Sequence[Matrix]) -> list[Matrix]:
    """Q u for each block, low-rank where u is (which ``structure.keeps_low_rank`` has to allow)."""
    outs: list[Tensor] = []

    def launch(p: Prepared) -> bool:
        outs[:] = [torch.empty(b.shape, dtype=torch.float32, device=p.plan.device) for b in p.ours]
        return p.plan.native.qv(p.plan.stream, p.plan.workspace.data_ptr(), p.gradients, p.factors, p.operators, outs)

    prepared = launched(Op.QV, blocks, us, launch)
    if prepared is None:
        return reference.qv(blocks, us)
    ours = iter(outs)
    return [
        next(ours) if covered else reference.qv([block], [u])[0]
        for block, u, covered in zip(blocks, us, prepared.plan.covered, strict=True)
    ]


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
