"""From blocks to what a plan's op takes: at once where the op had the same blocks before, else with a look at each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...algebra.matrix import Matrix
from ...model.block import Block
from ...model.gradients import GradientInPlace
from .coverage import why_uncovered
from .gradients import BlockGradient
from .operators import operators_of
from .plans import Op, Plan
from .runtime import runtime
from .state import CudaState, facts_of, plan_of


class Prepared(NamedTuple):
    """A plan and what it is given of the blocks that it covers."""

    plan: Plan
    ours: Sequence[Block]
    gradients: list[Tensor | None]  # of each part
    factors: list[Tensor | None] | None  # of each block's gradient; None: there are none
    operators: list[Tensor | None] | None  # P, S and A of each block; None: where the plan knows them to be


def launched(
    op: Op,
    blocks: Sequence[Block],
    us: Sequence[Matrix],
    launch: Callable[[Prepared], bool],
    vs: Sequence[Matrix] | None = None,
    spectral: bool = False,
) -> Prepared | None:
    """What has been launched; None where the kernels cover no block.

    ``launch`` returns False, and has launched nothing, where a tensor does not lie as the plan has it.
    ``spectral``: a θ step takes polar factors.
    """
    if not blocks:
        return None
    for exact in (False, True):
        prepared = (_exact if exact else _recent)(op, blocks, us, vs, spectral)
        if prepared is None:
            continue
        plan, done = prepared.plan, False
        if plan.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            plan.captured = True
        try:
            done = launch(prepared)
        finally:
            plan.generation = plan.operators.generation if done else -1
        if done:
            return prepared
        if exact:
            raise RuntimeError(f"a tensor of the blocks has moved while {op.name} was being prepared")
    return None


def _recent(
    op: Op, blocks: Sequence[Block], us: Sequence[Matrix], vs: Sequence[Matrix] | None, spectral: bool
) -> Prepared | None:
    """With the plan that the op last had, if it had the same blocks. Where their tensors lie, the plan looks itself."""
    plan = blocks[0].kept(CudaState).recent.get(op)
    if plan is None or plan.spectral != spectral or not plan.watch.same(blocks):
        return None
    if spectral and [b.spectral for b in blocks] != plan.may_be_flat:
        return None
    ours, mine = blocks, us
    if not all(plan.covered):
        ours = [b for b, covered in zip(blocks, plan.covered, strict=True) if covered]
        mine = [u for u, covered in zip(us, plan.covered, strict=True) if covered]
    found = [u for u in mine if type(u) is GradientInPlace]
    if len(found) != len(mine):
        return None
    gradients = runtime().extension.flattened([u.block for u in found], "grads")
    factors = [u.scale for u in found]
    none = factors[0] is None and all(f is None for f in factors)
    return Prepared(plan, ours, gradients, None if none else factors, _operators(plan, ours))


def _operators(plan: Plan, ours: Sequence[Block]) -> list[Tensor | None] | None:
    plan.operators.update(ours)
    return None if plan.generation == plan.operators.generation else plan.operators.tensors


def _exact(
    op: Op, blocks: Sequence[Block], us: Sequence[Matrix], vs: Sequence[Matrix] | None, spectral: bool
) -> Prepared | None:
    """With a look at each block, its parameters and its gradient."""
    facts = [facts_of(b) for b in blocks]
    gradients: list[BlockGradient | None] = []
    settled = True
    others: Sequence[Matrix | None] = vs or [None] * len(blocks)
    for block, found, u, v in zip(blocks, facts, us, others, strict=True):
        covered = why_uncovered(found, u, v, learning=op is Op.LAMBDA) is None
        settled = settled and (covered or why_uncovered(found, learning=op is Op.LAMBDA) is not None)
        gradients.append(BlockGradient(block, found, u) if covered else None)
    inside = [k for k, gradient in enumerate(gradients) if gradient is not None]
    state = blocks[0].kept(CudaState)
    state.recent.pop(op, None)
    if not inside:
        return None
    may_be_flat = [b.spectral for b in blocks]
    flat = [spectral and may and f.flat for may, f in zip(may_be_flat, facts, strict=True)]
    plan = plan_of(op, blocks, facts, gradients, flat)
    ours = [blocks[k] for k in inside]
    plan.spectral, plan.may_be_flat = spectral, may_be_flat
    shared = operators_of(state, plan.covered, ours, [facts[k] for k in inside])
    if plan.operators is not shared:
        plan.operators, plan.generation = shared, -1
    if settled:  # otherwise another gradient may be covered
        state.recent[op] = plan
    present = [g for g in gradients if g is not None]
    tensors = [t for g in present for t in g.tensors]
    return Prepared(plan, ours, tensors, [g.factor for g in present], _operators(plan, ours))
