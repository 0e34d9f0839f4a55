"""Q's two products over all blocks: X = (u S)ᵀ and P X, one launch each, whatever the shapes.

    right   Xᵀ (n, m) = S uᵀ    u (m, n) computed while it is loaded: m̂ = keep·m + take·g, or c·g, or α(F+γI)v − c·g
    left    C (m, n) = P X      with each block's ‖C‖² in the epilogue, or the whole update of θ

DiagKron, A∘(Rᵀ(B²∘(R(A∘u)L))Lᵀ), has two launches more in between: right with Lᵀ for S, left with R for P and B² in
the epilogue, right with L, left with Rᵀ. Its first and last are rows like any other block's.

In this order, and with Xᵀ stored transposed, every operand has the summed index contiguous, which tf32 needs for wgmma.
A sum of terms is one product of [P₁ P₂ …] and [X₁; X₂; …]. An outer diagonal A multiplies u while it is loaded and C
before it is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .access import (
    address,
    field,
    gradient,
    gradient_scale,
    last_number,
    leading,
    matrix,
    momentum_correction,
    outer_diagonal,
    scheduled,
    scheduled_step,
    tile_grid,
    tile_indices,
    told_address,
)
from .arithmetic import dot, finite, last_to_arrive, total
from .row_layout import F, H


@triton.jit
def operand(
    row, r, c, inside, keep, take, curve,
    SOURCE: tl.constexpr, SCALED: tl.constexpr, G: tl.constexpr, GENERAL: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_X: tl.constexpr, ALIGN_V: tl.constexpr,
):  # fmt: skip
    """u at rows r and columns c, of shapes that broadcast.

    SOURCE: "g" take·g; "mg" keep·m + take·g; "x" a matrix as it is; "residual" keep·fv + curve·v + take·g.
    """
    if SOURCE == "g":
        u = take * gradient(row, r, c, inside, G, GENERAL, ALIGN)
    else:
        u = matrix(row, F.X, F.LDX, r, c, inside, leading(row, F.X_COLS, ALIGN_X), ALIGN_X)
        if SOURCE != "x":
            u = keep * u + take * gradient(row, r, c, inside, G, GENERAL, ALIGN)
        if SOURCE == "residual":
            u += curve * matrix(row, F.V, F.LDV, r, c, inside, leading(row, F.V_COLS, ALIGN_V), ALIGN_V)
    if SCALED:
        u = u * outer_diagonal(row, r, c, inside)
    return u


@triton.jit(do_not_specialize=["tiles"])
def right_kernel(
    rows, schedule, corrections, broken, tiles,
    SOURCE: tl.constexpr, SCALED: tl.constexpr, COUNT: tl.constexpr, CHECK: tl.constexpr,
    G: tl.constexpr, GENERAL: tl.constexpr, ALIGN: tl.constexpr, ALIGN_X: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Xᵀ = S uᵀ of each term. Schedule: (row, tile of n, tile of m, term).

    COUNT: write each block's correction. CHECK: set ``broken`` to 1 where an entry is not finite.
    """
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry, row, hyper, i, j = scheduled_step(schedule, t, rows)
        term, m, n, np = last_number(entry), field(row, F.M), field(row, F.N), leading(row, F.NP, 16)
        rm, rn = tile_indices(i, j, BM, BN)
        if SOURCE == "g":
            keep, take = 0.0, gradient_scale(row)
        elif SOURCE == "x":
            keep, take = 0.0, 0.0
        else:
            keep, take = tl.load(hyper + H.KEEP), tl.load(hyper + H.TAKE)
        a_start = address(row, F.S, tl.float32, 16) + term * n * np + rm[:, None] * np
        acc = tl.zeros([BM, BN], tl.float32)
        for k in range(0, np.to(tl.int32), BK):
            kk = k + tl.arange(0, BK)
            a = tl.load(a_start + kk[None, :], mask=(rm < n)[:, None] & (kk < np)[None, :], other=0)
            b = operand(
                row, rn[:, None], kk[None, :], (rn < m)[:, None], keep, take, 0.0,
                SOURCE, SCALED, G, GENERAL, ALIGN, ALIGN_X, 1,
            )  # fmt: skip
            acc = dot(a, b, acc, PRECISION)
        mp = leading(row, F.MP, 16)
        c_start = address(row, F.XT, tl.float32, 16) + term * mp + rm[:, None] * (field(row, F.TERMS) * mp)
        tl.store(c_start + rn[None, :], acc, mask=(rm < n)[:, None] & (rn < mp)[None, :])
        if CHECK:
            tl.store(broken, 1, mask=finite(tl.sum(tl.abs(acc))) == 0)
        if COUNT:
            if (i == 0) & (j == 0) & (term == 0):
                tl.store(corrections + field(row, F.INDEX), momentum_correction(row, hyper))


@triton.jit
def left_tile(row, i, j, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Tile (i, j) of P X."""
    m, n, mp = field(row, F.M), field(row, F.N), leading(row, F.MP, 16)
    rm, rn = tile_indices(i, j, BM, BN)
    depth = field(row, F.TERMS) * mp
    a_start = address(row, F.P, tl.float32, 16) + rm[:, None] * depth
    b_start = address(row, F.XT, tl.float32, 16) + rn[:, None] * depth
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, depth.to(tl.int32), BK):
        kk = k + tl.arange(0, BK)
        inside = (kk < depth)[None, :]
        a = tl.load(a_start + kk[None, :], mask=(rm < m)[:, None] & inside, other=0)
        b = tl.load(b_start + kk[None, :], mask=(rn < n)[:, None] & inside, other=0)
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["tiles", "slots", "blocks"])
def left_kernel(
    rows, schedule, corrections, partials, slots, sums, blocks, arrived, tiles,
    SUMS: tl.constexpr,  # "none"; or ‖nat‖² and, per tile, "rms": whether g is zero, "trust": ⟨m̂, nat⟩, "norm": no more
    AFTER: tl.constexpr, SCALED: tl.constexpr, SQUARED: tl.constexpr, G: tl.constexpr, GENERAL: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_X: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """C = P X, A∘(P X) if SCALED, A²∘(P X) if SQUARED too. Schedule: (row, tile of m, tile of n, its number).

    sums (2, blocks): of the tiles' ``partials`` (2, slots). arrived (blocks,): zeros.
    """
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry, _, row, i, j = scheduled(schedule, t, rows, F.LENGTH)
        acc = left_tile(row, i, j, PRECISION, BM, BN, BK)
        m, np = field(row, F.M), leading(row, F.NP, 16)
        r, c = tile_grid(i, j, BM, BN)
        inside = r < m
        if SCALED:
            scaling = outer_diagonal(row, r, c, inside)
            if SQUARED:
                scaling = scaling * scaling
            acc = acc * scaling
        tl.store(told_address(row, F.OUT, tl.float32, 16) + r * np + c, acc, mask=inside & (c < np))
        if SUMS != "none":
            hyper = told_address(row, F.HYPER, tl.float32, 1)
            slot = partials + field(row, F.SLOT) + last_number(entry)
            correction = tl.load(corrections + field(row, F.INDEX))
            m, g = summed_tiles(row, r, c, inside, SUMS, AFTER, G, GENERAL, ALIGN, ALIGN_X)
            store_sums(hyper, acc, m, g, correction, slot, slots, SUMS, AFTER)
            add_up(row, partials, slots, sums, blocks, arrived, SUMS != "norm")


@triton.jit
def summed_tiles(
    row, r, c, inside, SUMS: tl.constexpr, AFTER: tl.constexpr, G: tl.constexpr, GENERAL: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_X: tl.constexpr,
):  # fmt: skip
    """The tiles of m and g that ``store_sums`` reads; 0 for what it does not."""
    m, g = 0.0, 0.0
    if AFTER or SUMS == "trust":
        m = matrix(row, F.X, F.LDX, r, c, inside, leading(row, F.X_COLS, ALIGN_X), ALIGN_X)
    if SUMS != "norm":
        g = gradient(row, r, c, inside, G, GENERAL, ALIGN)
    return m, g


@triton.jit
def store_sums(hyper, q, m, g, correction, slot, slots, SUMS: tl.constexpr, AFTER: tl.constexpr):
    """Write a tile's part of ‖nat‖² and of what SUMS names, from q: Q m̂, or Q g with momentum AFTER.

    ⟨m̂, nat⟩ (⟨g, nat⟩ with AFTER) comes times lr₀² and bias-corrected, so that blocks only have to be added.
    """
    keep, take = tl.load(hyper + H.KEEP), tl.load(hyper + H.TAKE)
    nat = q
    if AFTER:
        nat = keep * m + take * q
    tl.store(slot, tl.sum(nat * nat))
    if SUMS == "rms":
        tl.store(slot + slots, tl.max(tl.where(g == 0, 0.0, 1.0)))
    if SUMS == "trust":
        if AFTER:
            paired, power = g, correction
        else:
            paired, power = keep * m + take * g, correction * correction
        tl.store(slot + slots, tl.sum(paired * nat) * tl.load(hyper + H.BASE_LR_SQUARED) / power)


@triton.jit
def add_up(row, partials, slots, sums, blocks, arrived, BOTH: tl.constexpr):
    """Add the partial sums of a row's block, where this is its last tile: in the same order whichever is the last.

    sums (2, blocks), of partials (2, slots); BOTH: the second of them too.
    """
    index, count = field(row, F.INDEX), field(row, F.SLOTS)
    if last_to_arrive(arrived, index, count):
        mine = partials + field(row, F.SLOT)
        tl.store(sums + index, total(mine, count, 128))
        if BOTH:
            tl.store(sums + blocks + index, total(mine + slots, count, 128))
