"""The θ step on a CPU: products with Q, then the C++ plan's two passes over memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...algebra.low_rank import LowRank
from ...algebra.matrix import Matrix, dense
from ...algebra.polar import polar_factors
from ...model.block import Block
from ...model.gradients import GradientInPlace
from ..protocol import ThetaOptions
from ..reference import theta_update as reference
from ..reference.theta_update import ensure_product
from . import packed_products, polar
from .products import qv
from .state import packed_operator, step_plan
from .step_plan import Source, StepPlan


def theta_step(blocks: Sequence[Block], gs: Sequence[Matrix], options: ThetaOptions) -> tuple[Tensor, Tensor]:
    """As the reference's, which takes the steps of normalize="spectral" with momentum "after"."""
    spectral = options.normalize == "spectral"
    if spectral and not options.before:
        return reference.theta_step(blocks, gs, options)
    plan = step_plan(blocks)
    flat = [k for k, b in enumerate(blocks) if spectral and b.flattened]
    if flat:  # polar factors are of dense matrices
        gs = list(gs)
        for k in flat:
            gs[k] = GradientInPlace(blocks[k]) if isinstance(gs[k], LowRank) else gs[k]
    plan.place(gs)
    plan.set_rates()
    plan.set_mode(Source.DIAGONAL if options.before else Source.AFTER_DIAGONAL)
    threads = torch.get_num_threads()
    given = _give(plan, gs, flat, options, threads)
    lengths = _flatten(plan, flat, given) if flat else []
    norms = torch.empty(len(blocks), dtype=torch.float64, device="cpu")
    normalize = "rms" if spectral else options.normalize
    ok = plan.native.theta_step(norms.data_ptr(), options.averages, normalize, options.kappa, threads)
    for k, length in zip(flat, lengths, strict=True):
        norms[k] = length / (1 - blocks[k].beta ** (blocks[k].step.item() + options.averages - ok))
    if ok:
        plan.bring_back()
        torch.autograd.graph.increment_version(plan.moved)
        for k in plan.formed:
            follows = options.before and isinstance(gs[k], LowRank)
            blocks[k].product_version = blocks[k].structure.version if follows else None
    return norms.to(plan.dtype), torch.tensor(ok, device="cpu")


def _flatten(plan: StepPlan, flat: Sequence[int], given: Mapping[int, Tensor]) -> list[Tensor]:
    """Give the plan polar factors in the place of what it was given for these blocks. Returns the norms of that."""
    nats = [given[k] for k in flat]
    lengths = [torch.linalg.vector_norm(nat) for nat in nats]
    packed = [polar.covers(plan.blocks[k], nat) for k, nat in zip(flat, nats, strict=True)]
    polar.polar_factors(
        [plan.blocks[k] for k, mine in zip(flat, packed, strict=True) if mine],
        [nat for nat, mine in zip(nats, packed, strict=True) if mine],
    )
    others = [nat for nat, mine in zip(nats, packed, strict=True) if not mine]
    for nat, factor in zip(others, polar_factors(others, exact=True), strict=True):
        nat.copy_(factor)
    for k, nat in zip(flat, nats, strict=True):
        plan.native.give(k, Source.PRODUCT, nat.data_ptr(), 0, reference.RMS * max(nat.shape) ** 0.5)
    if not set(flat) <= set(plan.formed):
        plan.forget_mode()
    return lengths


def _give(
    plan: StepPlan, gs: Sequence[Matrix], flat: Sequence[int], options: ThetaOptions, threads: int
) -> dict[int, Tensor]:
    """Give the plan the products with Q. Returns the tensors that it points to, by number of the block."""
    blocks, before = plan.blocks, options.before
    formed = sorted({*plan.formed, *flat})
    averaged = [k for k in formed if before and not isinstance(gs[k], LowRank)]
    if averaged:
        outs = [0] * len(blocks)
        for k in averaged:
            outs[k] = blocks[k].scratch().data_ptr()
        plan.native.average(outs, options.averages, threads)
    mine = [k for k in formed if before and packed_products.covers(blocks[k])]
    kept = _give_packed(plan, gs, mine)
    rest = sorted(set(formed).difference(mine))
    after = {} if before else dict(zip(rest, qv([blocks[k] for k in rest], [gs[k] for k in rest]), strict=True))
    for k in rest:
        block, g, product = blocks[k], gs[k], 0
        if k in after:
            source, given = Source.AFTER, dense(after[k]).to(block.dtype)
        elif isinstance(g, LowRank):
            ensure_product(block)
            source, given = Source.LOW_RANK, _low_rank_natural(block, g)
            product = block.buffers()[0].data_ptr()
        else:
            source, given = Source.PRODUCT, block.structure.product(block.scratch())
        given = kept[k] = given.contiguous()
        plan.native.give(k, source, given.data_ptr(), product)
    return kept


def _give_packed(plan: StepPlan, gs: Sequence[Matrix], mine: Sequence[int]) -> dict[int, Tensor]:
    """Give the plan the products of packed blocks: of low-rank gradients packed, of which it makes Q g where needed."""
    low_rank = {k: g for k in mine if isinstance(g := gs[k], LowRank)}
    whole = [plan.blocks[k] for k in mine if k not in low_rank]
    unknown = [b for k in low_rank if not (b := plan.blocks[k]).product_known]
    scratch = [b.scratch() for b in whole]
    moments = [b.momentum for b in unknown]
    packed_products.product([*whole, *unknown], [*scratch, *moments], [*scratch, *(b.buffers()[0] for b in unknown)])
    for b in unknown:
        b.product_version = b.structure.version
    for k, natural in zip([k for k in mine if k not in low_rank], scratch, strict=True):
        plan.native.give(k, Source.PRODUCT, natural.data_ptr(), 0)
    if low_rank:
        blocks = [plan.blocks[k] for k in low_rank]
        products = packed_products.low_rank_products(blocks, list(low_rank.values()))
        rows = []
        for k, b, (left, right) in zip(low_rank, blocks, products, strict=True):
            scratch_at, product_at = packed_products.scratch_address(b), b.buffers()[0].data_ptr()
            rows.append((k, left.address, right.address, left.columns, scratch_at, product_at))
        plan.native.give_packed(packed_operator(blocks[0]).engine, rows)
    return dict(zip([k for k in mine if k not in low_rank], scratch, strict=True))


def _low_rank_natural(block: Block, g: LowRank) -> Tensor:
    """Q g of a low-rank g, (m, n), in the block's scratch memory."""
    block.structure.low_rank_product(g).into(block.scratch())
    return block.scratch()
