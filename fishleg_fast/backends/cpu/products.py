"""Cached products, Q u and inner products over lists of blocks on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import native
from ...algebra.maths import Applications
from ...algebra.matrix import Matrix
from ...model.block import Block
from ...model.gradients import GradientInPlace
from .. import reference
from . import packed_products
from .step_plan import CODES, dtype_of


def refresh(blocks: Sequence[Block], applications: Sequence[Applications] | None = None) -> None:
    """As the reference's; of packed blocks when they are multiplied."""
    counts = applications or [None] * len(blocks)
    rest = [(b, count) for b, count in zip(blocks, counts, strict=True) if not packed_products.covers(b)]
    reference.refresh([b for b, _ in rest], [count for _, count in rest])


def qv(blocks: Sequence[Block], us: Sequence[Matrix]) -> list[Matrix]:
    """As the reference's: of packed blocks together, of others one by one."""
    mine = [k for k, block in enumerate(blocks) if packed_products.covers(block)]
    others = sorted(set(range(len(blocks))).difference(mine))
    found = dict(zip(mine, packed_products.qv([blocks[k] for k in mine], [us[k] for k in mine]), strict=True))
    found |= zip(others, reference.qv([blocks[k] for k in others], [us[k] for k in others]), strict=True)
    return [found[k] for k in range(len(blocks))]


def inner(xs: Sequence[Matrix], ys: Sequence[Matrix]) -> Tensor:
    """Σ ⟨x, y⟩, in one call."""
    left, right = _tensors(xs), _tensors(ys)
    dtypes = None if left is None or right is None else [*map(dtype_of, left)]
    if left is None or right is None or dtypes is None or dtypes != [*map(dtype_of, right)]:
        return reference.inner(xs, ys)
    addresses = [*map(Tensor.data_ptr, left)]
    others = [*map(Tensor.data_ptr, right)]
    codes = [CODES[dtype] for dtype in dtypes]
    sum_ = native.extension().inner(addresses, others, [*map(Tensor.numel, left)], codes, torch.get_num_threads())
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    return torch.tensor(sum_, dtype=wide, device="cpu")


def _tensors(xs: Sequence[Matrix]) -> list[Tensor] | None:
    """``xs`` where the C++ code takes them: tensors without gaps, of one of its types."""
    whole = [x.dense if isinstance(x, GradientInPlace) else x for x in xs]
    tensors = [x for x in whole if isinstance(x, Tensor) and x.is_contiguous() and x.dtype in CODES]
    return tensors if len(tensors) == len(whole) else None
