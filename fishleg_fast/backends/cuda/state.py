"""What the CUDA backend keeps on a block: facts about it, and the plans of lists of blocks that start with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...model.block import BackendState, Block
from .coverage import BlockFacts, signature_of
from .gradients import BlockGradient
from .plans import Op, Plan, described
from .runtime import runtime

MOST_PLANS = 16  # of lists that start with the same block


@dataclass
class CudaState(BackendState):
    """All are filled as they are needed."""

    facts: BlockFacts | None = None
    plans: dict[Any, Plan] = field(default_factory=dict)
    recent: dict[Op, Plan] = field(default_factory=dict)  # each op's latest, where another step may find it at once
    operators: dict[tuple[bool, ...], Any] = field(default_factory=dict)  # by which blocks of a list are covered


def facts_of(block: Block) -> BlockFacts:
    """Looked up; found out anew where λ's tensors, or how parameters lie, have changed."""
    signature, state = signature_of(block), block.kept(CudaState)
    if state.facts is None or state.facts.signature != signature:
        state.facts = BlockFacts(block, signature)
    return state.facts


def plan_of(
    op: Op,
    blocks: Sequence[Block],
    facts: Sequence[BlockFacts],
    gradients: Sequence[BlockGradient | None],
    flat: Sequence[bool] = (),
) -> Plan:
    """The plan for blocks that lie like this. A gradient that is None: a block not covered, but in ``refresh``.

    ``flat``: of which blocks polar factors are taken, none by default.
    """
    flat = tuple(flat) or (False,) * len(blocks)
    device = blocks[0].momentum.device
    covered = [op is Op.REFRESH or g is not None for g in gradients]
    lie = [
        (b.structure.precision, *(() if g is None else g.layouts)) if ours else None
        for b, g, ours in zip(blocks, gradients, covered, strict=True)
    ]
    key = (op, device, tuple(map(id, facts)), tuple(lie), flat)
    plans = blocks[0].kept(CudaState).plans
    plan = plans.get(key)
    if plan is None:
        if len(plans) >= MOST_PLANS:  # a captured graph still writes to its plan's workspace
            for old in [k for k, p in plans.items() if not p.captured][:1]:
                del plans[old]
        layouts = [described(op, *given) for given in zip(blocks, facts, gradients, flat, strict=True)]
        compiled = runtime().extension.CudaPlan(int(op), layouts, device.index or 0)
        plan = plans[key] = Plan(compiled, blocks, facts, covered, device)
    return plan
