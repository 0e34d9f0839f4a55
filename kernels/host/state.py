"""What the Triton backend keeps on a block: its memory, and the plans of lists of blocks that start with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...model.block import BackendState, Block
from .tables.workspace import Scratch, Workspace


@dataclass
class TritonState(BackendState):
    """All are filled as they are needed."""

    workspace: Workspace | None = None
    polar: Scratch | None = None
    plans: list[Any] = field(default_factory=list)  # ``plans.Plan``, the latest used first


def workspace_of(block: Block) -> Workspace:
    """The block's, made at the first call."""
    state = block.kept(TritonState)
    if state.workspace is None or state.workspace.device != block.momentum.device:
        state.workspace = Workspace(block)
    return state.workspace


def polar_scratch_of(block: Block) -> Scratch:
    """Memory for the block's polar factor, which blocks that the kernels do not cover have too."""
    state = block.kept(TritonState)
    if state.polar is None or state.polar.device != block.momentum.device:
        state.polar = Scratch(block.momentum.device)
    return state.polar
