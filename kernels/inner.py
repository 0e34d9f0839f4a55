"""⟨x, y⟩ over all blocks together: one launch for the sums of chunks, in fixed order, and one sum of those.

Tensors are read where they are, in any dense order of memory that both share; others are copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import steps
from ..reference.thin import Matrix, Split
from .launch import launch
from .rows import DTYPES
from .shared import address
from .table import schedule, tiles, upload

CHUNK = 4096  # elements
WARPS = 8


@triton.jit(do_not_specialize=["tiles"])
def inner_kernel(rows, schedule, partials, tiles, X: tl.constexpr, Y: tl.constexpr, CHUNK: tl.constexpr):
    """Rows: (address of x, address of y, elements). Schedule: (row, unused, chunk, number among the sums)."""
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry = schedule + t * 4
        row = rows + tl.load(entry) * 3
        at = tl.load(entry + 2).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
        inside = at < tl.load(row + 2)
        x = tl.load(address(row, 0, X, 1) + at, mask=inside, other=0).to(tl.float32)
        y = tl.load(address(row, 1, Y, 1) + at, mask=inside, other=0).to(tl.float32)
        tl.store(partials + tl.load(entry + 3), tl.sum(x * y))


def _dense(t: Tensor) -> bool:
    """Whether the elements fill one piece of memory."""
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _pairs(x: Matrix, y: Matrix) -> Iterator[tuple[Tensor, Tensor]] | None:
    """Tensors whose products add up to ⟨x, y⟩; None where that takes the reference."""
    if isinstance(x, Split) and isinstance(y, Split) and x.block is y.block and x.scale is None is y.scale:
        grads = [g for g in x.block.grads if g is not None]
        return zip(grads, grads, strict=True)
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return iter([(x, y)])
    return None


def _covered(t: Tensor) -> bool:
    return t.dtype in DTYPES and t.layout == torch.strided


def inner(xs: Sequence[Matrix], ys: Sequence[Matrix]) -> Tensor:
    """As ``reference.inner``; float32."""
    groups: dict[tuple[torch.dtype, torch.dtype, torch.device], list[tuple[Tensor, Tensor]]] = {}
    others: list[Tensor] = []
    for x, y in zip(xs, ys, strict=True):
        pairs = _pairs(x, y)
        found = None if pairs is None else list(pairs)
        if found is None or not all(_covered(t) for pair in found for t in pair):
            others.append(steps.inner([x], [y]))
            continue
        for a, b in found:
            if a.numel():
                if a.stride() != b.stride() or not _dense(a):
                    a, b = a.contiguous(), b.contiguous()
                groups.setdefault((a.dtype, b.dtype, a.device), []).append((a, b))
    sums = []
    for (X, Y, device), pairs in groups.items():
        entries = tiles([(k, 1, a.numel(), 0) for k, (a, _) in enumerate(pairs)], 1, CHUNK)
        entries, count = schedule(tuple((*e[:3], k) for k, e in enumerate(entries)), device)
        rows = upload(tuple(v for a, b in pairs for v in (a.data_ptr(), b.data_ptr(), a.numel())), torch.int64, device)
        partials = torch.empty(count, dtype=torch.float32, device=device)
        launch(
            inner_kernel, count, rows, entries, partials, device=device, per_processor=4,
            X=DTYPES[X], Y=DTYPES[Y], CHUNK=CHUNK, num_warps=WARPS,
        )  # fmt: skip
        sums.append(partials.sum())
    if len(sums) == 1 and not others:
        return sums[0]
    device = (sums or others or [torch.zeros(())])[0].device
    return torch.stack([s.to(device) for s in (*sums, *others)]).sum() if sums or others else torch.zeros(())
