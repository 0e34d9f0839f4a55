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

from .shared import (
    F_A,
    F_INDEX,
    F_LDA,
    F_LDV,
    F_LDX,
    F_M,
    F_MP,
    F_N,
    F_NP,
    F_OUT,
    F_P,
    F_S,
    F_SCALE,
    F_SLOT,
    F_TERMS,
    F_V,
    F_X,
    F_XCOLS,
    F_XT,
    FIELDS,
    H_BASE,
    H_KEEP,
    H_TAKE,
    HYPERS,
    address,
    correction,
    dot,
    field,
    gradient,
    leading,
)


@triton.jit
def scale(row):
    """The device scalar that multiplies the gradient, or 1."""
    at = tl.load(row + F_SCALE)
    return tl.load(at.to(tl.pointer_type(tl.float32)), mask=at != 0, other=1.0)


@triton.jit
def matrix(row, F: tl.constexpr, LD: tl.constexpr, r, c, inside, limit, ALIGN: tl.constexpr):
    """A tile of a float32 matrix at rows r and columns c < limit."""
    at = address(row, F, tl.float32, ALIGN) + r * leading(row, LD, ALIGN) + c
    return tl.load(at, mask=inside & (c < limit), other=0)


@triton.jit
def outer(row, r, c, inside):
    """A tile of the outer diagonal A, or ones."""
    at = address(row, F_A, tl.float32, 1) + r * field(row, F_LDA) + c
    return tl.load(at, mask=inside & (c < field(row, F_N)) & (field(row, F_A) != 0), other=1.0)


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
        u = matrix(row, F_X, F_LDX, r, c, inside, leading(row, F_XCOLS, ALIGN_X), ALIGN_X)
        if SOURCE != "x":
            u = keep * u + take * gradient(row, r, c, inside, G, GENERAL, ALIGN)
        if SOURCE == "residual":
            u += curve * matrix(row, F_V, F_LDV, r, c, inside, field(row, F_N), ALIGN_V)
    if SCALED:
        u = u * outer(row, r, c, inside)
    return u


@triton.jit(do_not_specialize=["tiles", "slots"])
def right_kernel(
    rows, hypers, schedule, corrections, checks, tiles,
    SOURCE: tl.constexpr, SCALED: tl.constexpr, COUNT: tl.constexpr, CHECK: tl.constexpr,
    G: tl.constexpr, GENERAL: tl.constexpr, ALIGN: tl.constexpr, ALIGN_X: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Xᵀ = S uᵀ of each term. Schedule: (row, tile of n, tile of m, term).

    COUNT: write each block's correction. CHECK: write each tile's Σ|Xᵀ|, not finite where any entry is not.
    """
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry = schedule + t * 4
        row = rows + tl.load(entry) * FIELDS
        hyper = hypers + tl.load(entry) * HYPERS
        i, j, term = tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
        m, n, np = field(row, F_M), field(row, F_N), leading(row, F_NP, 16)
        rm, rn = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN)
        if SOURCE == "g":
            keep, take = 0.0, scale(row)
        elif SOURCE == "x":
            keep, take = 0.0, 0.0
        else:
            keep, take = tl.load(hyper + H_KEEP), tl.load(hyper + H_TAKE)
        a_start = address(row, F_S, tl.float32, 16) + term * n * np + rm[:, None] * np
        acc = tl.zeros([BM, BN], tl.float32)
        for k in range(0, np.to(tl.int32), BK):
            kk = k + tl.arange(0, BK)
            a = tl.load(a_start + kk[None, :], mask=(rm < n)[:, None] & (kk < np)[None, :], other=0)
            b = operand(
                row, rn[:, None], kk[None, :], (rn < m)[:, None], keep, take, 0.0,
                SOURCE, SCALED, G, GENERAL, ALIGN, ALIGN_X, 1,
            )  # fmt: skip
            acc = dot(a, b, acc, PRECISION)
        mp = leading(row, F_MP, 16)
        c_start = address(row, F_XT, tl.float32, 16) + term * mp + rm[:, None] * (field(row, F_TERMS) * mp)
        tl.store(c_start + rn[None, :], acc, mask=(rm < n)[:, None] & (rn < mp)[None, :])
        if CHECK:
            tl.store(checks + t, tl.sum(tl.abs(acc)))
        if COUNT:
            if (i == 0) & (j == 0) & (term == 0):
                tl.store(corrections + field(row, F_INDEX), correction(row, hyper))


@triton.jit
def left_tile(row, i, j, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Tile (i, j) of P X."""
    m, n, mp = field(row, F_M), field(row, F_N), leading(row, F_MP, 16)
    rm, rn = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN)
    depth = field(row, F_TERMS) * mp
    a_start = address(row, F_P, tl.float32, 16) + rm[:, None] * depth
    b_start = address(row, F_XT, tl.float32, 16) + rn[:, None] * depth
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, depth.to(tl.int32), BK):
        kk = k + tl.arange(0, BK)
        inside = (kk < depth)[None, :]
        a = tl.load(a_start + kk[None, :], mask=(rm < m)[:, None] & inside, other=0)
        b = tl.load(b_start + kk[None, :], mask=(rn < n)[:, None] & inside, other=0)
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["tiles", "slots"])
def left_kernel(
    rows, hypers, schedule, corrections, partials, slots, tiles,
    SUMS: tl.constexpr,  # "none"; or ‖nat‖² and, per tile, "rms": whether g is zero, "trust": ⟨m̂, nat⟩, "norm": no more
    AFTER: tl.constexpr, SCALED: tl.constexpr, SQUARED: tl.constexpr, G: tl.constexpr, GENERAL: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_X: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """C = P X, A∘(P X) if SCALED, A²∘(P X) if SQUARED too. Schedule: (row, tile of m, tile of n, its number)."""
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry = schedule + t * 4
        row = rows + tl.load(entry) * FIELDS
        i, j = tl.load(entry + 1), tl.load(entry + 2)
        acc = left_tile(row, i, j, PRECISION, BM, BN, BK)
        m, np = field(row, F_M), leading(row, F_NP, 16)
        r, c = (i * BM + tl.arange(0, BM))[:, None], (j * BN + tl.arange(0, BN))[None, :]
        inside = r < m
        if SCALED:
            scaling = outer(row, r, c, inside)
            if SQUARED:
                scaling = scaling * scaling
            acc = acc * scaling
        tl.store(address(row, F_OUT, tl.float32, 16) + r * np + c, acc, mask=inside & (c < np))
        if SUMS != "none":
            hyper = hypers + tl.load(entry) * HYPERS
            slot = partials + field(row, F_SLOT) + tl.load(entry + 3)
            corrected = tl.load(corrections + field(row, F_INDEX))
            sums(row, hyper, r, c, inside, acc, corrected, slot, slots, SUMS, AFTER, G, GENERAL, ALIGN, ALIGN_X)


@triton.jit
def sums(
    row, hyper, r, c, inside, q, corrected, slot, slots,
    SUMS: tl.constexpr, AFTER: tl.constexpr, G: tl.constexpr, GENERAL: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_X: tl.constexpr,
):  # fmt: skip
    """Write a tile's part of ‖nat‖² and of what SUMS names, from q: Q m̂, or Q g with momentum AFTER.

    ⟨m̂, nat⟩ (⟨g, nat⟩ with AFTER) comes times lr₀² and bias-corrected, so that blocks only have to be added.
    """
    keep, take = tl.load(hyper + H_KEEP), tl.load(hyper + H_TAKE)
    if AFTER or SUMS == "trust":
        m = matrix(row, F_X, F_LDX, r, c, inside, leading(row, F_XCOLS, ALIGN_X), ALIGN_X)
    if SUMS != "norm":
        g = gradient(row, r, c, inside, G, GENERAL, ALIGN)
    nat = q
    if AFTER:
        nat = keep * m + take * q
    tl.store(slot, tl.sum(nat * nat))
    if SUMS == "rms":
        tl.store(slot + slots, tl.max(tl.where(g == 0, 0.0, 1.0)))
    if SUMS == "trust":
        if AFTER:
            paired, power = g, corrected
        else:
            paired, power = keep * m + take * g, corrected * corrected
        tl.store(slot + slots, tl.sum(paired * nat) * tl.load(hyper + H_BASE) / power)
