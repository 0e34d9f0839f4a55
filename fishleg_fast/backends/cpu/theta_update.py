"""The θ step on a CPU: products with Q, then the C++ plan's two passes over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...algebra.low_rank import LowRank
from ...algebra.matrix import Matrix, dense
from ...model.block import Block
from ..protocol import ThetaOptions
from ..reference.theta_update import ensure_product
from . import packed_products
from .products import qv
from .state import packed_operator, step_plan
from .step_plan import Source, StepPlan


def theta_step(blocks: Sequence[Block], gs: Sequence[Matrix], options: ThetaOptions) -> tuple[Tensor, Tensor]:
    """As the reference's."""
    plan = step_plan(blocks)
    plan.place(gs)
    plan.set_rates()
    plan.set_mode(Source.DIAGONAL if options.before else Source.AFTER_DIAGONAL)
    threads = torch.get_num_threads()
    given = _give(plan, gs, options, threads)
    norms = torch.empty(len(blocks), dtype=torch.float64)
    ok = plan.native.theta_step(norms.data_ptr(), options.averages, options.normalize, options.kappa, threads)
    del given
    if ok:
        plan.bring_back()
        torch.autograd.graph.increment_version(plan.moved)
        for k in plan.formed:
            follows = options.before and isinstance(gs[k], LowRank)
            blocks[k].product_version = blocks[k].structure.version if follows else None
    return norms.to(plan.dtype), torch.tensor(ok)


def _give(plan: StepPlan, gs: Sequence[Matrix], options: ThetaOptions, threads: int) -> list[Tensor]:
    """Give the plan the products with Q. Returns the tensors that it points to."""
    blocks, before = plan.blocks, options.before
    averaged = [k for k in plan.formed if before and not isinstance(gs[k], LowRank)]
    if averaged:
        outs = [0] * len(blocks)
        for k in averaged:
            outs[k] = blocks[k].scratch().data_ptr()
        plan.native.average(outs, options.averages, threads)
    kept = []
    mine = [k for k in plan.formed if before and packed_products.covers(blocks[k])]
    _give_packed(plan, gs, mine)
    rest = sorted(set(plan.formed).difference(mine))
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
        given = given.contiguous()
        kept.append(given)
        plan.native.give(k, source, given.data_ptr(), product)
    return kept


def _give_packed(plan: StepPlan, gs: Sequence[Matrix], mine: Sequence[int]) -> None:
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


def _low_rank_natural(block: Block, g: LowRank) -> Tensor:
    """Q g of a low-rank g, (m, n), in the block's scratch memory."""
    block.structure.low_rank_product(g).into(block.scratch())
    return block.scratch()
