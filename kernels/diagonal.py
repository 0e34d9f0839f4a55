"""The λ step of all Diagonal blocks, Q u = d²∘u: one launch for its sums, one for Adam on d.

∂⟨w, Q u⟩/∂d = 2 d∘u∘w, with w = α(F+γI)v − u, or d²∘w with precondition.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .lambda_kernels import adam, biases, decision, dots_tile, multiple
from .products import matrix, scale
from .shared import (
    F_A,
    F_FIRST,
    F_LDA,
    F_LDV,
    F_LDX,
    F_M,
    F_N,
    F_P,
    F_S,
    F_SLOT,
    F_STEP,
    F_V,
    F_X,
    FIELDS,
    address,
    count,
    field,
    gradient,
)


@triton.jit(do_not_specialize=["tiles", "dot_slots"])
def diagonal_sums_kernel(
    rows, schedule, corrections, used, dots, dot_slots, squares, damping, log2beta1, log2beta2, tiles,
    PRECONDITION: tl.constexpr, G: tl.constexpr, GENERAL: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """uᵀv, vᵀ(F+γI)v, and the squares of both terms of the gradient: it is finite, whatever α, where they are.

    Schedule: (row, tile of rows, tile of columns, number of the tile). ``used`` (rows, 2): Adam's bias corrections,
    which the next launch reads while it counts.
    """
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry = schedule + t * 4
        number = tl.load(entry)
        row = rows + number * FIELDS
        i, j = tl.load(entry + 1), tl.load(entry + 2)
        r, c = (i * ROWS + tl.arange(0, ROWS))[:, None], (j * COLS + tl.arange(0, COLS))[None, :]
        inside = r < field(row, F_M)
        slot = field(row, F_SLOT) + tl.load(entry + 3)
        u, v, fv = dots_tile(row, r, c, inside, dots + slot, dot_slots, damping, False, G, GENERAL, ALIGN)
        d = matrix(row, F_A, F_LDA, r, c, inside, field(row, F_N), 1)
        du = 2 * d * u
        if PRECONDITION:
            du = du * d * d
        curved = fv + damping * v
        tl.store(squares + slot, tl.sum(du * du * (curved * curved + u * u)))
        if (i == 0) & (j == 0):
            given = corrections + number * 2
            bias1, bias2 = biases(row, F_STEP, given, log2beta1, log2beta2)
            tl.store(used + number * 2, bias1)
            tl.store(used + number * 2 + 1, bias2)


@triton.jit(do_not_specialize=["tiles", "dot_slots", "square_slots"])
def diagonal_adam_kernel(
    rows, schedule, used, dots, dot_slots, squares, square_slots, loss, taken, lr, beta1, beta2, eps, damping,
    tiles,
    RESCALE: tl.constexpr, PRECONDITION: tl.constexpr, G: tl.constexpr, GENERAL: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """d and its moments. Schedule: (row, tile of rows, tile of columns, unused)."""
    aux_loss, ok = decision(dots, dot_slots, squares, square_slots)
    if tl.program_id(0) == 0:
        tl.store(loss, aux_loss)
        tl.store(taken, ok)
    alpha, rate = multiple(dots, dot_slots, RESCALE), tl.load(lr)
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry = schedule + t * 4
        number = tl.load(entry)
        row = rows + number * FIELDS
        i, j = tl.load(entry + 1), tl.load(entry + 2)
        r, c = (i * ROWS + tl.arange(0, ROWS))[:, None], (j * COLS + tl.arange(0, COLS))[None, :]
        n = field(row, F_N)
        inside = r < field(row, F_M)
        u = scale(row) * gradient(row, r, c, inside, G, GENERAL, ALIGN)
        v = matrix(row, F_V, F_LDV, r, c, inside, n, 1)
        fv = matrix(row, F_X, F_LDX, r, c, inside, n, 1)
        w = alpha * (fv + damping * v) - u
        written = inside & (c < n) & ok
        at = r * field(row, F_LDA) + c
        d_at = address(row, F_A, tl.float32, 1) + at
        avg_at, avg_sq_at = address(row, F_S, tl.float32, 1) + at, address(row, F_P, tl.float32, 1) + at
        d = tl.load(d_at, mask=written, other=0)
        avg, avg_sq = tl.load(avg_at, mask=written, other=0), tl.load(avg_sq_at, mask=written, other=0)
        if PRECONDITION:
            w = d * d * w
        g = 2 * d * u * w
        bias1, bias2 = tl.load(used + number * 2), tl.load(used + number * 2 + 1)
        tl.store(d_at, adam(d, g, avg, avg_sq, bias1, bias2, rate, beta1, beta2, eps), mask=written)
        tl.store(avg_at, avg + (1 - beta1) * (g - avg), mask=written)
        tl.store(avg_sq_at, beta2 * avg_sq + (1 - beta2) * g * g, mask=written)
        if (i == 0) & (j == 0) & (field(row, F_FIRST) != 0):
            count(row, F_STEP, ok)
