"""Kernels over λ's factors F (k, k), F = L or Rᵀ: copies of them, F Fᵀ, and M + Mᵀ.

Of symmetric results half the tiles are computed, (i, j) with j ≤ i, and each is stored twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .access import address, field, leading, scheduled, tile_grid, tile_indices
from .arithmetic import dot
from .row_layout import K


@triton.jit
def aux_offsets(row, r, c, TRANSPOSED: tl.constexpr):
    """Offsets in λ of F's entries (r, c)."""
    ld = field(row, K.LD_AUX)
    if TRANSPOSED:
        at = c * ld + r
    else:
        at = r * ld + c
    return at


@triton.jit
def factor_tile(row, r, c, k, TRANSPOSED: tl.constexpr, ALIGN: tl.constexpr):
    """F at rows r and columns c, of shapes that broadcast."""
    start = address(row, K.AUX, tl.float32, ALIGN)
    ld = leading(row, K.LD_AUX, ALIGN)
    if TRANSPOSED:
        at = start + c * ld + r
    else:
        at = start + r * ld + c
    return tl.load(at, mask=(r < k) & (c < k), other=0)


@triton.jit(do_not_specialize=["tiles"])
def copy_kernel(rows, schedule, tiles, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """F from λ, where F Fᵀ would go, with zeros in the padding. Schedule: (row, i, j, unused)."""
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _, _, row, i, j = scheduled(schedule, t, rows, K.LENGTH)
        r, c = tile_grid(i, j, ROWS, COLS)
        size = leading(row, K.SIZE, ALIGN)
        at = address(row, K.SQUARE, tl.float32, 16) + r * leading(row, K.LD_SQUARE, 16) + c
        written = (r < size) & (c < leading(row, K.PADDED, 16))
        if field(row, K.TRANSPOSED) != 0:
            tl.store(at, factor_tile(row, r, c, size, True, ALIGN), mask=written)
        else:
            tl.store(at, factor_tile(row, r, c, size, False, ALIGN), mask=written)


@triton.jit
def square_of_aux(
    row, rm, rn, TRANSPOSED: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of F Fᵀ, from λ."""
    k = leading(row, K.SIZE, ALIGN).to(tl.int32)
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, k, BK):
        kk = start + tl.arange(0, BK)
        a = factor_tile(row, rm[:, None], kk[None, :], k, TRANSPOSED, ALIGN)
        b = factor_tile(row, rn[:, None], kk[None, :], k, TRANSPOSED, ALIGN)
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def store_symmetric(start, ld, acc, rm, rn, i, j, size, limit, ok):
    """Write a tile and, off the diagonal, its transpose. ``limit``: ``size`` with the padding."""
    tl.store(start + rm[:, None] * ld + rn[None, :], acc, mask=(rm < size)[:, None] & (rn < limit)[None, :] & ok)
    if i != j:
        mask = (rn < size)[:, None] & (rm < limit)[None, :] & ok
        tl.store(start + rn[:, None] * ld + rm[None, :], tl.trans(acc), mask=mask)


@triton.jit(do_not_specialize=["tiles", "slots"])
def refresh_kernel(
    rows, schedule, tiles,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """S and P from λ. Schedule: (row, i, j ≤ i, unused)."""
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _, _, row, i, j = scheduled(schedule, t, rows, K.LENGTH)
        rm, rn = tile_indices(i, j, BM, BN)
        if field(row, K.TRANSPOSED) != 0:
            acc = square_of_aux(row, rm, rn, True, ALIGN, PRECISION, BM, BN, BK)
        else:
            acc = square_of_aux(row, rm, rn, False, ALIGN, PRECISION, BM, BN, BK)
        start, ld = address(row, K.SQUARE, tl.float32, 16), leading(row, K.LD_SQUARE, 16)
        store_symmetric(start, ld, acc, rm, rn, i, j, field(row, K.SIZE), leading(row, K.PADDED, 16), i >= 0)


@triton.jit(do_not_specialize=["tiles", "slots"])
def pair_kernel(
    rows, schedule, tiles, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """M + Mᵀ with M = left rightᵀ, (k, depth) each. Schedule: (row, i, j ≤ i, unused)."""
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _, _, row, i, j = scheduled(schedule, t, rows, K.LENGTH)
        rm, rn = tile_indices(i, j, BM, BN)
        size, depth = field(row, K.SIZE), leading(row, K.DEPTH, 16)
        left, right = address(row, K.LEFT, tl.float32, 16), address(row, K.RIGHT, tl.float32, 16)
        ld = leading(row, K.LD_RIGHT, 16)
        acc = tl.zeros([BM, BN], tl.float32)
        for start in range(0, depth.to(tl.int32), BK):
            kk = (start + tl.arange(0, BK))[None, :]
            inside = kk < depth
            in_m, in_n = (rm < size)[:, None] & inside, (rn < size)[:, None] & inside
            a = tl.load(left + rm[:, None] * depth + kk, mask=in_m, other=0)
            b = tl.load(right + rn[:, None] * ld + kk, mask=in_n, other=0)
            acc = dot(a, b, acc, PRECISION)
            a = tl.load(right + rm[:, None] * ld + kk, mask=in_m, other=0)
            b = tl.load(left + rn[:, None] * depth + kk, mask=in_n, other=0)
            acc = dot(a, b, acc, PRECISION)
        limit = leading(row, K.PADDED, 16)
        store_symmetric(address(row, K.SYM, tl.float32, 16), limit, acc, rm, rn, i, j, size, limit, i >= 0)
