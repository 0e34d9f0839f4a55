"""Kernels of Diagonal blocks alone, Q u = d²∘u: that product, and a λ step's sums and Adam on d.

∂⟨w, Q u⟩/∂d = 2 d∘u∘w, with w = α(F+γI)v − u, or d²∘w with precondition.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .access import (
    address,
    diagonal_matrix,
    field,
    gradient,
    gradient_scale,
    increment,
    last_number,
    matrix,
    scheduled,
    tile_grid,
    told_address,
)
from .arithmetic import adam, first_moment, last_to_arrive, second_moment, total
from .commit import decide
from .lambda_step import adam_corrections, dots_tile, rescaling
from .row_layout import F


@triton.jit(do_not_specialize=["tiles"])
def diagonal_product_kernel(
    rows, schedule, tiles, G: tl.constexpr, GENERAL: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """d²∘u, into the row's V. Schedule: (row, tile of rows, tile of columns, unused)."""
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _, _, row, i, j = scheduled(schedule, t, rows, F.LENGTH)
        r, c = tile_grid(i, j, ROWS, COLS)
        n = field(row, F.N)
        inside = r < field(row, F.M)
        d = diagonal_matrix(row, r, c, inside)
        u = gradient_scale(row) * gradient(row, r, c, inside, G, GENERAL, ALIGN)
        at = told_address(row, F.V, tl.float32, 1) + r * field(row, F.LDV) + c
        tl.store(at, d * d * u, mask=inside & (c < n))


@triton.jit(do_not_specialize=["tiles", "dot_slots", "blocks"])
def diagonal_sums_kernel(
    rows, schedule, corrections, used, dots, dot_slots, squares, dot_sums, blocks, square_sums, arrived, damping,
    log2beta1, log2beta2, tiles,
    PRECONDITION: tl.constexpr, G: tl.constexpr, GENERAL: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """uᵀv, vᵀ(F+γI)v, and the squares of both terms of the gradient: it is finite, whatever α, where they are.

    Each block's are added up by its last tile, into dot_sums (2, blocks) and square_sums. arrived (blocks,): zeros.
    Schedule: (row, tile of rows, tile of columns, number of the tile). ``used`` (rows, 2): Adam's bias corrections,
    which the next launch reads while it counts.
    """
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry, number, row, i, j = scheduled(schedule, t, rows, F.LENGTH)
        r, c = tile_grid(i, j, ROWS, COLS)
        inside = r < field(row, F.M)
        slot = field(row, F.SLOT) + last_number(entry)
        u, v, fv = dots_tile(row, r, c, inside, dots + slot, dot_slots, damping, False, G, GENERAL, ALIGN)
        d = diagonal_matrix(row, r, c, inside)
        du = 2 * d * u
        if PRECONDITION:
            du = du * d * d
        curved = fv + damping * v
        tl.store(squares + slot, tl.sum(du * du * (curved * curved + u * u)))
        index, count = field(row, F.INDEX), field(row, F.SLOTS)
        if last_to_arrive(arrived, index, count):
            first = field(row, F.SLOT)
            tl.store(dot_sums + index, total(dots + first, count, 256))
            tl.store(dot_sums + blocks + index, total(dots + dot_slots + first, count, 256))
            tl.store(square_sums + index, total(squares + first, count, 256))
        if (i == 0) & (j == 0):
            given = corrections + number * 2
            correction1, correction2 = adam_corrections(row, F.STEP, given, log2beta1, log2beta2)
            tl.store(used + number * 2, correction1)
            tl.store(used + number * 2 + 1, correction2)


@triton.jit(do_not_specialize=["tiles", "blocks", "square_count"])
def diagonal_adam_kernel(
    rows, schedule, used, dot_sums, blocks, square_sums, square_count, lr, beta1, beta2, eps, damping, loss, taken,
    tiles,
    RESCALE: tl.constexpr, PRECONDITION: tl.constexpr, G: tl.constexpr, GENERAL: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """d and its moments. Schedule: (row, tile of rows, tile of columns, unused)."""
    ok = decide(dot_sums, blocks, square_sums, square_count, loss, taken)
    alpha, rate = rescaling(dot_sums, blocks, RESCALE), tl.load(lr)
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _, number, row, i, j = scheduled(schedule, t, rows, F.LENGTH)
        r, c = tile_grid(i, j, ROWS, COLS)
        n = field(row, F.N)
        inside = r < field(row, F.M)
        u = gradient_scale(row) * gradient(row, r, c, inside, G, GENERAL, ALIGN)
        v = matrix(row, F.V, F.LDV, r, c, inside, n, 1)
        fv = matrix(row, F.X, F.LDX, r, c, inside, n, 1)
        w = alpha * (fv + damping * v) - u
        written = inside & (c < n) & ok
        at = r * field(row, F.LDA) + c
        d_at = address(row, F.A, tl.float32, 1) + at
        avg_at, avg_sq_at = address(row, F.AVG, tl.float32, 1) + at, address(row, F.AVG_SQ, tl.float32, 1) + at
        d = tl.load(d_at, mask=written, other=0)
        avg, avg_sq = tl.load(avg_at, mask=written, other=0), tl.load(avg_sq_at, mask=written, other=0)
        if PRECONDITION:
            w = d * d * w
        g = 2 * d * u * w
        correction1, correction2 = tl.load(used + number * 2), tl.load(used + number * 2 + 1)
        avg, avg_sq = first_moment(avg, g, beta1), second_moment(avg_sq, g, beta2)
        tl.store(d_at, adam(d, avg, avg_sq, correction1, correction2, rate, eps), mask=written)
        tl.store(avg_at, avg, mask=written)
        tl.store(avg_sq_at, avg_sq, mask=written)
        if (i == 0) & (j == 0) & (field(row, F.FIRST) != 0):
            increment(row, F.STEP, ok)
