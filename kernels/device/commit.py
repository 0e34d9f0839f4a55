"""The last launch of a λ step: whether it is taken, and what it writes then (``lambda_step``)."""

from __future__ import annotations

import triton
import triton.language as tl

from .access import address, field, increment, last_number, leading, scheduled, tile_grid, tile_indices
from .arithmetic import all_finite, dot, finite, first_moment, second_moment, total
from .factors import aux_offsets, store_symmetric
from .row_layout import K


@triton.jit
def decide(dot_sums, blocks, square_sums, square_count, loss_at, taken):
    """Whether λ is to be written, from the sums of blocks and of factors. The first program stores that and 𝒜."""
    uQu, vFv = total(dot_sums, blocks, 256), total(dot_sums + blocks, blocks, 256)
    loss = 0.5 * vFv - uQu
    ok = tl.where(finite(loss) & (uQu != 0), 1, 0)  # by integers: the interpreter takes what floats decide for a float
    ok = (ok != 0) & all_finite(square_sums, square_count, 256)
    if tl.program_id(0) == 0:
        tl.store(loss_at, loss)
        tl.store(taken, ok)
    return ok


@triton.jit
def commit_tile(row, r, c, beta1, beta2, ok, TRANSPOSED: tl.constexpr):
    """λ and its moments at a tile of F, where ``ok``."""
    size = field(row, K.SIZE)
    inside = (r < size) & (c < size) & ok
    ours, at = r * leading(row, K.PADDED, 16) + c, aux_offsets(row, r, c, TRANSPOSED)
    g = tl.load(address(row, K.GRAD, tl.float32, 16) + ours, mask=inside, other=0)
    avg_at, avg_sq_at = address(row, K.AVG, tl.float32, 1) + at, address(row, K.AVG_SQ, tl.float32, 1) + at
    avg, avg_sq = tl.load(avg_at, mask=inside, other=0), tl.load(avg_sq_at, mask=inside, other=0)
    tl.store(avg_at, first_moment(avg, g, beta1), mask=inside)
    tl.store(avg_sq_at, second_moment(avg_sq, g, beta2), mask=inside)
    new = tl.load(address(row, K.NEW, tl.float32, 16) + ours, mask=inside, other=0)
    tl.store(address(row, K.AUX, tl.float32, 1) + at, new, mask=inside)


@triton.jit(do_not_specialize=["tiles", "blocks", "square_count"])
def commit_kernel(
    rows, schedule, dot_sums, blocks, square_sums, square_count, beta1, beta2, loss, taken, tiles,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """S, P, λ and its moments. Schedule: (row, i, j, 0: tile of F Fᵀ with j ≤ i; 1: elementwise tile of F)."""
    ok = decide(dot_sums, blocks, square_sums, square_count, loss, taken)
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry, _, row, i, j = scheduled(schedule, t, rows, K.LENGTH)
        if last_number(entry) == 0:
            rm, rn = tile_indices(i, j, BM, BN)
            size, depth = field(row, K.SIZE), leading(row, K.PADDED, 16)
            start = address(row, K.NEW, tl.float32, 16)
            acc = tl.zeros([BM, BN], tl.float32)
            for k in range(0, depth.to(tl.int32), BK):
                kk = (k + tl.arange(0, BK))[None, :]
                a = tl.load(start + rm[:, None] * depth + kk, mask=(rm < size)[:, None] & (kk < depth), other=0)
                b = tl.load(start + rn[:, None] * depth + kk, mask=(rn < size)[:, None] & (kk < depth), other=0)
                acc = dot(a, b, acc, PRECISION)
            square, ld = address(row, K.SQUARE, tl.float32, 16), leading(row, K.LD_SQUARE, 16)
            store_symmetric(square, ld, acc, rm, rn, i, j, size, depth, ok)
        else:
            r, c = tile_grid(i, j, ROWS, COLS)
            if field(row, K.TRANSPOSED) != 0:
                commit_tile(row, r, c, beta1, beta2, ok, True)
            else:
                commit_tile(row, r, c, beta1, beta2, ok, False)
            if (i == 0) & (j == 0) & (field(row, K.FIRST) != 0):
                increment(row, K.STEP, ok)
