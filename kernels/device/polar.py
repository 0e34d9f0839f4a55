"""Polar factors of nat over all blocks: X ← aX + (bA + cA²)X with A = X Xᵀ, six times (``algebra/polar.py``).

    unit        X = nat/‖nat‖ and Xᵀ
    symmetric   A = X Xᵀ            half the tiles
    symmetric   B = bA + cA²        half the tiles; at the first step A², and of each tile its part of ‖A²‖²
    apply       X ← aX + BX and Xᵀ; at the first step of X/√‖A²‖^½, whose largest singular value is at most 1

19 launches. X is (short, long): nat, or its transpose where nat is tall. Xᵀ is there beside X, so that every operand
has the summed index contiguous; apply reads one and writes another, which changes places with it for the next step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .access import address, field, last_number, leading, matrix, scheduled, scheduled_step, tile_grid, tile_indices
from .arithmetic import dot, last_to_arrive, total
from .factors import store_symmetric
from .row_layout import POLAR, F, H
from .theta_step import stored_product


@triton.jit(do_not_specialize=["tiles"])
def unit_kernel(
    rows, schedule, sums, tiles,
    AFTER: tl.constexpr, DIAGONAL: tl.constexpr, G: tl.constexpr, GENERAL: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_X: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """nat/‖nat‖ and its transpose, with zeros in the padding. Schedule: (row, i, j, unused).

    sums (blocks,): ‖nat‖².
    """
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _, row, hyper, i, j = scheduled_step(schedule, t, rows)
        r, c = tile_grid(i, j, ROWS, COLS)
        m, n = field(row, F.M), field(row, F.N)
        mp, np = leading(row, F.MP, 16), leading(row, F.NP, 16)
        inside = r < m
        nat = stored_product(row, hyper, r, c, inside, AFTER, DIAGONAL, G, GENERAL, ALIGN)
        if AFTER:
            x = matrix(row, F.X, F.LDX, r, c, inside, leading(row, F.X_COLS, ALIGN_X), ALIGN_X)
            nat = tl.load(hyper + H.KEEP) * x + tl.load(hyper + H.TAKE) * nat
        square = tl.load(sums + field(row, F.INDEX))
        nat = tl.where(inside & (c < n), nat, 0.0) / tl.where(square > 0, tl.sqrt(square), 1.0)
        tl.store(address(row, F.POLAR, tl.float32, 16) + r * np + c, nat, mask=inside & (c < np))
        at = address(row, F.POLAR_T, tl.float32, 16) + tl.trans(c) * mp + tl.trans(r)
        tl.store(at, tl.trans(nat), mask=tl.trans((c < n) & (r < mp)))


@triton.jit
def square_of_rows(acc, start, size, depth, rm, rn, PRECISION: tl.constexpr, BK: tl.constexpr):
    """acc + a tile of F Fᵀ, for F (size, depth) at ``start``; depth is its leading dimension too."""
    for k in range(0, depth.to(tl.int32), BK):
        kk = (k + tl.arange(0, BK))[None, :]
        inside = kk < depth
        a = tl.load(start + rm[:, None] * depth + kk, mask=(rm < size)[:, None] & inside, other=0)
        b = tl.load(start + rn[:, None] * depth + kk, mask=(rn < size)[:, None] & inside, other=0)
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["tiles"])
def symmetric_kernel(
    rows, schedule, squares, bounds, arrived, linear, quadratic, tiles,
    STAGE: tl.constexpr,  # "gram": A = X Xᵀ; "bound": B = A² and its tiles' sums of squares; "combined": B = bA + cA²
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A or B. Schedule: (row, i, j ≤ i, number of the tile).

    bounds (rows,): ‖A²‖² of each matrix, from its tiles' ``squares``. arrived (rows,): zeros.
    """
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry, number, row, i, j = scheduled(schedule, t, rows, POLAR.LENGTH)
        rm, rn = tile_indices(i, j, BM, BN)
        size = field(row, POLAR.SHORT)
        if STAGE == "gram":
            X, depth = address(row, POLAR.X, tl.float32, 16), leading(row, POLAR.LONG_PADDED, 16)
        else:
            X, depth = address(row, POLAR.A, tl.float32, 16), leading(row, POLAR.SHORT_PADDED, 16)
        acc = tl.zeros([BM, BN], tl.float32)
        if STAGE == "combined":  # c(A² + b/c A): registers are free before the product
            inside = (rm < size)[:, None] & (rn < size)[None, :]
            acc = linear / quadratic * tl.load(X + rm[:, None] * depth + rn[None, :], mask=inside, other=0)
        acc = square_of_rows(acc, X, size, depth, rm, rn, PRECISION, BK)
        ld = leading(row, POLAR.SHORT_PADDED, 16)
        if STAGE == "combined":
            acc *= quadratic
        if STAGE == "bound":
            both = tl.where(i == j, 1.0, 2.0)  # the tile and its mirror image
            tl.store(squares + field(row, POLAR.SLOT) + last_number(entry), both * tl.sum(acc * acc))
        if STAGE == "gram":
            result = address(row, POLAR.A, tl.float32, 16)
        else:
            result = address(row, POLAR.B, tl.float32, 16)
        store_symmetric(result, ld, acc, rm, rn, i, j, size, ld, i >= 0)
        if STAGE == "bound":
            count = field(row, POLAR.SLOTS)
            if last_to_arrive(arrived, number, count):
                tl.store(bounds + number, total(squares + field(row, POLAR.SLOT), count, 256))


@triton.jit(do_not_specialize=["tiles"])
def apply_kernel(
    rows, schedule, bounds, keep, linear, quadratic, tiles,
    FIRST: tl.constexpr,  # B holds A²
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """X ← keep·X + BX, and its transpose. Schedule: (row, tile of the short side, tile of the long one, unused)."""
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _, number, row, i, j = scheduled(schedule, t, rows, POLAR.LENGTH)
        rm, rn = tile_indices(i, j, BM, BN)
        short, long = field(row, POLAR.SHORT), field(row, POLAR.LONG)
        depth, ld = leading(row, POLAR.SHORT_PADDED, 16), leading(row, POLAR.LONG_PADDED, 16)
        if FIRST:
            square = tl.load(bounds + number)
            bound = tl.where(square > 0, tl.sqrt(tl.sqrt(square)), 1.0)  # of the squared singular values
            linear_here, quadratic_here, scale = linear / bound, quadratic / (bound * bound), 1 / tl.sqrt(bound)
            A = address(row, POLAR.A, tl.float32, 16) + rm[:, None] * depth
        B = address(row, POLAR.B, tl.float32, 16) + rm[:, None] * depth
        XT = address(row, POLAR.XT, tl.float32, 16) + rn[:, None] * depth
        acc = tl.zeros([BM, BN], tl.float32)
        for k in range(0, depth.to(tl.int32), BK):
            kk = (k + tl.arange(0, BK))[None, :]
            inside = kk < depth
            b = tl.load(B + kk, mask=(rm < short)[:, None] & inside, other=0)
            if FIRST:
                b = linear_here * tl.load(A + kk, mask=(rm < short)[:, None] & inside, other=0) + quadratic_here * b
            x = tl.load(XT + kk, mask=(rn < long)[:, None] & inside, other=0)
            acc = dot(b, x, acc, PRECISION)
        x_at = address(row, POLAR.X, tl.float32, 16) + rm[:, None] * ld + rn[None, :]
        written = (rm < short)[:, None] & (rn < ld)[None, :]
        acc += keep * tl.load(x_at, mask=written, other=0)
        if FIRST:
            acc *= scale
        tl.store(x_at, acc, mask=written)
        at = address(row, POLAR.NEXT_XT, tl.float32, 16) + rn[:, None] * depth + rm[None, :]
        tl.store(at, tl.trans(acc), mask=(rn < long)[:, None] & (rm < depth)[None, :])
