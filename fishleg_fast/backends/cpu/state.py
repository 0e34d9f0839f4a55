"""What the CPU backend keeps on a block: the plan of a list of blocks that starts with it, and its packed operands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...model.block import BackendState, Block
from .packed_matrix import ENGINES, PackedScratch
from .packed_operator import PackedOperator
from .step_plan import StepPlan


@dataclass
class CpuState(BackendState):
    """Each is made when it is first needed."""

    plan: StepPlan | None = None
    packed: PackedOperator | None = None
    polar: PackedScratch | None = None


def step_plan(blocks: Sequence[Block]) -> StepPlan:
    """That of this list of blocks, made anew when the list is another."""
    state = blocks[0].kept(CpuState)
    if state.plan is None or state.plan.blocks != list(blocks):
        state.plan = StepPlan(blocks)
    return state.plan


def packed_operator(block: Block) -> PackedOperator:
    """The block's, for what its operands are rounded to."""
    dtype, state = block.structure.operand_dtype, block.kept(CpuState)
    assert dtype is not None
    if state.packed is None or state.packed.engine != ENGINES[dtype]:
        state.packed = PackedOperator(block, ENGINES[dtype])
    return state.packed


def polar_scratch(block: Block) -> PackedScratch:
    """Memory for the block's polar factor, for what its operands are rounded to."""
    dtype, state = block.structure.operand_dtype, block.kept(CpuState)
    assert dtype is not None
    if state.polar is None or state.polar.engine != ENGINES[dtype]:
        state.polar = PackedScratch(ENGINES[dtype])
    return state.polar
