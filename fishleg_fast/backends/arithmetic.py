"""The arithmetic of the optimizer's own products, whatever the user's passes are in."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch

from ..model.block import Block
from ..precision import kernel_precision, operand_dtype, precision_scope
from .denormals import denormals_flushed


def own_arithmetic(blocks: Sequence[Block], precision: str | None) -> ExitStack:
    """A context in which ops on ``blocks`` multiply at ``precision`` (None: torch's setting), and out of autocast.

    On a CPU denormal numbers count as zero.
    """
    kernels, dtypes = kernel_precision(precision), {}
    for block in blocks:
        where = block.momentum.device, block.momentum.dtype
        if where not in dtypes:
            dtypes[where] = operand_dtype(precision, *where)
        block.structure.precision, block.structure.operand_dtype = kernels, dtypes[where]
    stack = ExitStack()
    for kind in {block.momentum.device.type for block in blocks[:1]}:
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if kind == "cpu":
            stack.enter_context(denormals_flushed())
    if precision is not None:
        stack.enter_context(precision_scope(precision))
    return stack
