"""⟨x, y⟩: sums over chunks of tensors that lie alike in memory."""

from __future__ import annotations

import triton
import triton.language as tl

from .access import address, field, last_number, scheduled
from .row_layout import PAIR


@triton.jit(do_not_specialize=["tiles"])
def inner_kernel(rows, schedule, partials, tiles, X: tl.constexpr, Y: tl.constexpr, CHUNK: tl.constexpr):
    """Schedule: (row, unused, chunk, number among the sums)."""
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry, _, row, _, chunk = scheduled(schedule, t, rows, PAIR.LENGTH)
        at = chunk.to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
        inside = at < field(row, PAIR.ELEMENTS)
        x = tl.load(address(row, PAIR.X, X, 1) + at, mask=inside, other=0).to(tl.float32)
        y = tl.load(address(row, PAIR.Y, Y, 1) + at, mask=inside, other=0).to(tl.float32)
        tl.store(partials + last_number(entry), tl.sum(x * y))
