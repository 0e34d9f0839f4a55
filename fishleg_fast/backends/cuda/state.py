"""What the CUDA backend keeps on a block: facts about it, and the plans of lists of blocks that start with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...model.block import BackendState, Block
from .coverage import BlockFacts
from .plans import GradientViews, Op, Plan, described
from .runtime import runtime

MOST_PLANS = 16  # of lists that start with the same block


@dataclass
class CudaState(BackendState):
    """Both are filled as they are needed."""

    facts: BlockFacts | None = None
    plans: dict[Any, Plan] = field(default_factory=dict)


def facts_of(block: Block) -> BlockFacts:
    """Looked up; found out anew where λ's tensors, or where the parameters are, have changed."""
    signature: list[Any] = [id(t) for t in block.structure.fishleg_aux.values()]
    for part in block.parts:
        p = part.param
        signature += (p.data_ptr(), p.stride(), p.dtype)
    state = block.kept(CudaState)
    if state.facts is None or state.facts.signature != signature:
        state.facts = BlockFacts(block, signature)
    return state.facts


def plan_of(
    op: Op,
    blocks: Sequence[Block],
    facts: Sequence[BlockFacts],
    views: Sequence[GradientViews | None],
    flat: Sequence[bool] = (),
) -> Plan:
    """The plan for blocks that lie like this, with nothing pointed to yet. A view that is None: a block not covered.

    ``flat``: of which blocks polar factors are taken, none by default.
    """
    flat = tuple(flat) or (False,) * len(blocks)
    device = blocks[0].momentum.device
    lie = [None if v is None else (b.structure.precision, *v.layouts) for b, v in zip(blocks, views, strict=True)]
    if op is Op.REFRESH:
        lie = [(b.structure.precision,) for b in blocks]
    key = (op, device, tuple(map(id, facts)), tuple(lie), flat)
    plans = blocks[0].kept(CudaState).plans
    plan = plans.get(key)
    if plan is None:
        if len(plans) >= MOST_PLANS:  # a captured graph still writes to its plan's workspace
            for old in [k for k, p in plans.items() if not p.captured][:1]:
                del plans[old]
        layouts = [described(op, *given) for given in zip(blocks, facts, views, flat, strict=True)]
        compiled = runtime().extension.CudaPlan(int(op), layouts, device.index or 0)
        uncovered = 0 if op is Op.REFRESH else sum(v is None for v in views)
        plan = plans[key] = Plan(compiled, len(blocks), uncovered, device)
        plan.facts = list(facts)  # alive, so that their ids are theirs
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        plan.captured = True
    plan.begin()
    return plan
