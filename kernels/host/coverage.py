"""Which blocks the kernels cover; the reference's functions do the work of the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...algebra.structures.diagkron import DIAGKRON
from ...algebra.structures.diagonal import DIAGONAL
from ...algebra.structures.kron import KRON, KRON_SCALED
from ...algebra.structures.sumkron import SUMKRON
from ...model.block import Block
from .configurations import library_product
from .launch import DTYPES
from .tables.strides import columns

KINDS = {KRON: "kron", KRON_SCALED: "kron", SUMKRON: "kron", DIAGKRON: "diagkron", DIAGONAL: "diagonal"}
FACTORED = ("kron", "diagkron")  # kinds with products by factors


def covered_kind(block: Block) -> str | None:
    """Which of the values of KINDS the kernels cover the block as, None where they do not.

    Covered are Kron, SumKron and DiagKron (dense factors), and Diagonal, with λ in float32, over parameters of float32,
    bfloat16 or float16: a weight seen as (m, numel/m), with a bias as its last column or without; of a Diagonal also
    any parameters below each other. Two strides have to tell where a weight's columns are, as for contiguous,
    transposed and channels-last ones.
    """
    name = KINDS.get(block.structure.maths)
    if name is None or any(t.dtype != torch.float32 for t in block.structure.fishleg_aux.values()):
        return None
    views = [part.of(part.param) for part in block.parts]
    if len({v.dtype for v in views}) > 1 or views[0].dtype not in DTYPES:
        return None
    if block.axis == 0:
        flat = all(columns(v, vector=True) is not None for v in views)
        return name if name == "diagonal" and flat else None
    if name in FACTORED and any(t.ndim != 2 for t in block.structure.fishleg_aux.values()):
        return None
    if len(views) > 2 or (len(views) == 2 and views[1].numel() != views[1].shape[0]):
        return None
    return name if columns(views[0]) is not None else None


def kind(block: Block) -> str | None:
    """``covered_kind``, but None for blocks so large that torch.mm is faster."""
    found = covered_kind(block)
    return None if found in FACTORED and library_product(*block.shape, block.structure.precision) else found


def kinds_of(blocks: Sequence[Block]) -> list[str | None]:
    """``kind`` of each; None too for blocks on another device than the first that has one."""
    found = [kind(b) for b in blocks]
    device = next((b.momentum.device for b, k in zip(blocks, found, strict=True) if k), None)
    return [k if b.momentum.device == device else None for b, k in zip(blocks, found, strict=True)]


def counts_on_device(counter: Tensor, block: Block, capturable: bool) -> bool:
    """Whether one of the block's step counters is where its kernels can read and write it."""
    return counter.device == block.momentum.device and (capturable or counter.device.type == "cuda")
