"""Which blocks the CUDA kernels cover, and what they are told of them."""

from __future__ import annotations

from typing import Any

import torch

from ...algebra.low_rank import LowRank
from ...algebra.matrix import Matrix
from ...algebra.structures.diagonal import DIAGONAL
from ...algebra.structures.kron import KRON, KRON_SCALED
from ...model.block import Block
from ...model.gradients import GradientInPlace
from .runtime import runtime

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/cuda numbers them
PRECISIONS = {"ieee": 0, "tf32x3": 1, "tf32": 2, "bf16": 3}
MOST_DIMS = 4
ALIGNED = 4  # entries: rows of our matrices start at multiples of 16 bytes, and are copied 16 bytes at a time, not 4
LARGE = 1024  # from here on in both sides torch's own products are taken to be faster: not measured yet

UNCOVERED = 0  # of csrc/cuda/host/plan.h's Kind; the others:
_KINDS = ((KRON, 1), (KRON_SCALED, 2), (DIAGONAL, 3))


class BlockFacts:
    """What the kernels are told of a block, and does not change from step to step."""

    __slots__ = ("flat", "kind", "kronecker", "layout", "offsets", "signature", "why")

    def __init__(self, block: Block, signature: list[Any]) -> None:
        self.signature = signature
        self.why = _why_uncovered(block)
        self.kind = next((kind for maths, kind in _KINDS if block.structure.maths is maths), UNCOVERED)
        self.kronecker = self.kind in (1, 2)
        self.flat = min(block.shape) > 1 and block.dtype == torch.float32  # whether its nat may be
        views = [part.of(part.param) for part in block.parts]
        self.offsets = [0]
        for v in views:
            self.offsets.append(self.offsets[-1] + v.numel() // (max(v.shape[0], 1) if block.axis else 1))
        first_rows = [-1 if p.rows is None else p.rows.indices(p.param.shape[0])[0] for p in block.parts]
        self.layout = [
            (tuple(v.shape), v.stride(), TYPES.get(v.dtype, 0), first)
            for v, first in zip(views, first_rows, strict=True)
        ]


def signature_of(block: Block) -> list[Any]:
    """What ``BlockFacts`` depend on."""
    found: list[Any] = [block.structure.operand_dtype]
    for t in block.structure.fishleg_aux.values():
        found += (id(t), t.dtype, t.device, t.is_contiguous())
    for part in block.parts:
        p = part.param
        found += (p.shape, p.stride(), p.dtype, p.device)
    return found


def _why_uncovered(block: Block) -> str | None:
    structure, kind = block.structure, runtime().kind
    if not any(structure.maths is maths for maths, _ in _KINDS):
        return "its structure is not Kron or Diagonal"
    for name, t in structure.fishleg_aux.items():
        if t.dtype != torch.float32 or t.device.type != kind or not t.is_contiguous():
            return f"λ {name!r} is not contiguous float32 on a {kind} device"
        if name in ("R", "L") and t.ndim != 2:
            return f"factor {name!r} is not dense"
    if structure.maths is not DIAGONAL and structure.operand_dtype not in (None, torch.float32):
        return f"its products are to be {structure.operand_dtype}"
    if structure.maths is not DIAGONAL and min(block.shape) >= LARGE:
        return f"both sides are at least {LARGE}: torch's products are taken to be faster"
    for p in (part.param for part in block.parts):
        if p.dtype not in TYPES or p.layout != torch.strided or p.device != block.momentum.device:
            return f"a parameter is {p.dtype}, {p.layout} on {p.device}"
        if p.ndim > MOST_DIMS and not p.is_contiguous():
            return "a parameter has more dimensions than the kernels follow"
    return None


def why_uncovered(
    facts: BlockFacts, u: Matrix | None = None, v: Matrix | None = None, learning: bool = False
) -> str | None:
    """Why the kernels leave a block, or products with u and v, to the reference's functions; None: they do not.

    ``learning``: whether λ's gradient is wanted.
    """
    if facts.why is not None:
        return facts.why
    if learning and facts.kind == 2:
        return "the gradient of an outer diagonal"
    if isinstance(u, LowRank) or isinstance(v, LowRank):
        return "a low-rank gradient"
    if isinstance(u, GradientInPlace):
        for grad in u.block.grads:
            if grad is not None and (grad.dtype not in TYPES or grad.layout != torch.strided):
                return f"a gradient is {grad.dtype}, {grad.layout}"
            if grad is not None and grad.ndim > MOST_DIMS and not grad.is_contiguous():
                return "a gradient has more dimensions than the kernels follow"
    return None
