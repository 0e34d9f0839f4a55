"""⟨x, y⟩ over all blocks together: one launch for the sums of chunks, in fixed order, and one sum of those.

Tensors are read where they are, in any dense order of memory that both share; others are copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...algebra.matrix import Matrix
from ...backends import reference
from ...model.gradients import GradientInPlace
from ..device.inner import inner_kernel
from ..device.row_layout import PAIR
from .configurations import INNER_PRODUCTS
from .launch import DTYPES, launch
from .tables.uploads import schedule, tiles, upload_rows


def _dense(t: Tensor) -> bool:
    """Whether the elements fill one piece of memory."""
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _pairs(x: Matrix, y: Matrix) -> list[tuple[Tensor, Tensor]] | None:
    """Tensors whose products add up to ⟨x, y⟩; None where that takes the reference."""
    if (
        isinstance(x, GradientInPlace)
        and isinstance(y, GradientInPlace)
        and x.block is y.block
        and x.scale is None is y.scale
    ):
        found = [(g, g) for g in x.block.grads if g is not None]
    elif isinstance(x, Tensor) and isinstance(y, Tensor):
        found = [(x, y)]
    else:
        return None
    return found if all(t.dtype in DTYPES and t.layout == torch.strided for pair in found for t in pair) else None


def inner(xs: Sequence[Matrix], ys: Sequence[Matrix]) -> Tensor:
    """As the reference's; float32."""
    groups: dict[tuple[torch.dtype, torch.dtype, torch.device], list[tuple[Tensor, Tensor]]] = {}
    others: list[Tensor] = []
    for x, y in zip(xs, ys, strict=True):
        pairs = _pairs(x, y)
        if pairs is None:
            others.append(reference.inner([x], [y]))
            continue
        for a, b in pairs:
            if a.numel():
                if a.stride() != b.stride() or not _dense(a):
                    a, b = a.contiguous(), b.contiguous()
                groups.setdefault((a.dtype, b.dtype, a.device), []).append((a, b))
    sums = []
    for (X, Y, device), members in groups.items():
        shapes, slot = [], 0
        for k, (a, _) in enumerate(members):
            shapes.append((k, 1, a.numel(), slot))
            slot += -(-a.numel() // INNER_PRODUCTS.CHUNK)
        entries, count = schedule(tiles(shapes, 1, INNER_PRODUCTS.CHUNK, numbered=True), device)
        packed = [PAIR.pack(X=a.data_ptr(), Y=b.data_ptr(), ELEMENTS=a.numel()) for a, b in members]
        rows = upload_rows(packed, torch.int64, device)
        partials = torch.empty(count, dtype=torch.float32, device=device)
        launch(
            inner_kernel, count, rows, entries, partials, device=device, per_processor=4,
            X=DTYPES[X], Y=DTYPES[Y], **INNER_PRODUCTS._asdict(),
        )  # fmt: skip
        sums.append(partials.sum())
    if len(sums) == 1 and not others:
        return sums[0]
    found = [*sums, *others] or [torch.zeros((), device="cpu")]
    return torch.stack([s.to(found[0].device) for s in found]).sum()
