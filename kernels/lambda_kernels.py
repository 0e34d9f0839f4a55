"""The λ step over all blocks: one Adam step on 𝒜 = ½ vᵀ(F+γI)v − uᵀv, with w = α(F+γI)v − u held constant.

For Kron and SumKron, whatever the number of blocks, 4 launches:

    products    (Pw)ᵀ and wS of each term, w computed while it is loaded; uᵀv, vᵀ(F+γI)v; u and uᵀ, padded
    pairs       M + Mᵀ, N + Nᵀ with M = uᵀPw, N = wSuᵀ: half the tiles
    gradients   dL = (M+Mᵀ)L, dRᵀ = (N+Nᵀ)Rᵀ, with Adam in the epilogue: new factors beside the old ones
    commit      S = LLᵀ, P = RᵀR of the new factors, half the tiles; λ and Adam's moments written where all is finite

1 more without learn_scale, since w needs α = uᵀv/vᵀ(F+γI)v; 2 more with precondition, for Q w. All Diagonal blocks take
2 more. Sums are in fixed order, and the host waits for nothing but step counters of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .factors import (
    FACTOR_FIELDS,
    K_AVG,
    K_AVG_SQ,
    K_FIRST,
    K_GRAD,
    K_LAMBDA,
    K_LD,
    K_LDSQUARE,
    K_NEW,
    K_PADDED,
    K_SIZE,
    K_SLOT,
    K_SQUARE,
    K_STEP,
    K_SYM,
    K_TRANSPOSED,
)
from .products import matrix, operand, scale
from .shared import (
    F_LDV,
    F_LDX,
    F_M,
    F_MP,
    F_N,
    F_NP,
    F_P,
    F_S,
    F_SLOT,
    F_TERMS,
    F_U,
    F_UT,
    F_V,
    F_WS,
    F_X,
    F_XT,
    FIELDS,
    address,
    all_finite,
    count,
    counter,
    dot,
    field,
    finite,
    gradient,
    leading,
    one_minus_power,
    total,
)
from .symmetric import store_symmetric

KIND = tl.constexpr(1 << 20)  # a tile's fourth number is kind·KIND + its term, or its number among the sums


@triton.jit
def multiple(dots, dot_slots, RESCALE: tl.constexpr):
    """α = uᵀv/vᵀ(F+γI)v, or 1; sampled Hessians may have negative curvature."""
    alpha = 1.0
    if RESCALE:
        uQu, vFv = total(dots, dot_slots, 1024), total(dots + dot_slots, dot_slots, 1024)
        alpha = tl.where(vFv > 0, uQu / tl.where(vFv > 0, vFv, 1.0), 1.0)
    return alpha


@triton.jit
def decision(dots, dot_slots, squares, square_slots):
    """(𝒜, whether λ is to be written)."""
    uQu, vFv = total(dots, dot_slots, 1024), total(dots + dot_slots, dot_slots, 1024)
    loss = 0.5 * vFv - uQu
    ok = tl.where(finite(loss) & (uQu != 0), 1, 0)  # by integers: the interpreter takes what floats decide for a float
    return loss, (ok != 0) & all_finite(squares, square_slots, 1024)


@triton.jit
def dots_tile(
    row, r, c, inside, slot, dot_slots, damping, STORE: tl.constexpr,
    G: tl.constexpr, GENERAL: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A tile's part of uᵀv and vᵀ(F+γI)v; with STORE, u as our own matrix and its transpose."""
    n = field(row, F_N)
    u = scale(row) * gradient(row, r, c, inside, G, GENERAL, ALIGN)
    v = matrix(row, F_V, F_LDV, r, c, inside, n, 1)
    fv = matrix(row, F_X, F_LDX, r, c, inside, n, 1)
    tl.store(slot, tl.sum(u * v))
    tl.store(slot + dot_slots, tl.sum(v * (fv + damping * v)))
    if STORE:
        np, mp = leading(row, F_NP, 16), leading(row, F_MP, 16)
        tl.store(address(row, F_U, tl.float32, 16) + r * np + c, u, mask=inside & (c < np))
        at = address(row, F_UT, tl.float32, 16) + tl.trans(c) * mp + tl.trans(r)
        tl.store(at, tl.trans(u), mask=tl.trans((c < n) & (r < mp)))
    return u, v, fv


@triton.jit
def product_tile(
    row, i, j, term, alpha, damping, LEFT: tl.constexpr, PRECONDITION: tl.constexpr,
    SOURCE: tl.constexpr, G: tl.constexpr, GENERAL: tl.constexpr, ALIGN: tl.constexpr, ALIGN_X: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """LEFT: P w, else S wᵀ; stored transposed, as the next product needs it, but S wᵀ for a PRECONDITION as it is."""
    m, n, np, mp = field(row, F_M), field(row, F_N), leading(row, F_NP, 16), leading(row, F_MP, 16)
    stacked = field(row, F_TERMS) * mp
    rm, rn = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN)
    if LEFT:
        rows, depth = m, mp
        a_start = address(row, F_P, tl.float32, 16) + term * mp + rm[:, None] * stacked
    else:
        rows, depth = n, np
        a_start = address(row, F_S, tl.float32, 16) + term * n * np + rm[:, None] * np
    take = -scale(row)
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, depth.to(tl.int32), BK):
        kk = k + tl.arange(0, BK)
        a = tl.load(a_start + kk[None, :], mask=(rm < rows)[:, None] & (kk < depth)[None, :], other=0)
        if LEFT:  # wᵀ: rows of the tile are columns of w
            r, c = kk[None, :], rn[:, None]
        else:
            r, c = rn[:, None], kk[None, :]
        b = operand(
            row, r, c, r < m, alpha, take, alpha * damping, SOURCE, False, G, GENERAL, ALIGN, ALIGN_X, 1
        )  # fmt: skip
        acc = dot(a, b, acc, PRECISION)
    if PRECONDITION:
        at = address(row, F_XT, tl.float32, 16) + term * mp + rm[:, None] * stacked + rn[None, :]
        tl.store(at, acc, mask=(rm < n)[:, None] & (rn < mp)[None, :])
    elif LEFT:
        at = address(row, F_XT, tl.float32, 16) + term * mp + rn[:, None] * stacked + rm[None, :]
        tl.store(at, tl.trans(acc), mask=(rn < n)[:, None] & (rm < mp)[None, :])
    else:
        at = address(row, F_WS, tl.float32, 16) + term * m * np + rn[:, None] * np + rm[None, :]
        tl.store(at, tl.trans(acc), mask=(rn < m)[:, None] & (rm < np)[None, :])


@triton.jit(do_not_specialize=["tiles", "dot_slots"])
def products_kernel(
    rows, schedule, dots, dot_slots, damping, tiles,
    RESCALE: tl.constexpr, PRECONDITION: tl.constexpr, SOURCE: tl.constexpr,
    G: tl.constexpr, GENERAL: tl.constexpr, ALIGN: tl.constexpr, ALIGN_X: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """wS, (Pw)ᵀ and sums; for a PRECONDITION S wᵀ and sums.

    Schedule: (row, i, j, kind·KIND + term), kind 0: wS, 1: Pw, 2: sums of an elementwise tile.
    """
    alpha = multiple(dots, dot_slots, RESCALE)
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry = schedule + t * 4
        row = rows + tl.load(entry) * FIELDS
        i, j, code = tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
        kind, term = code // KIND, code % KIND
        if kind == 0:
            product_tile(
                row, i, j, term, alpha, damping, False, PRECONDITION,
                SOURCE, G, GENERAL, ALIGN, ALIGN_X, PRECISION, BM, BN, BK,
            )  # fmt: skip
        elif kind == 1:
            if not PRECONDITION:
                product_tile(
                    row, i, j, term, alpha, damping, True, False,
                    SOURCE, G, GENERAL, ALIGN, ALIGN_X, PRECISION, BM, BN, BK,
                )  # fmt: skip
        else:
            r, c = (i * ROWS + tl.arange(0, ROWS))[:, None], (j * COLS + tl.arange(0, COLS))[None, :]
            slot = dots + field(row, F_SLOT) + term
            dots_tile(row, r, c, r < field(row, F_M), slot, dot_slots, damping, True, G, GENERAL, ALIGN)


@triton.jit
def aux_gradient(
    row, rm, rn, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A tile of ∂F = (M + Mᵀ) F, from our M + Mᵀ and λ's F = L or, TRANSPOSED, Rᵀ."""
    size, depth = leading(row, K_SIZE, ALIGN), leading(row, K_PADDED, 16)
    a_start = address(row, K_SYM, tl.float32, 16) + rm[:, None] * depth
    b_start, ld = address(row, K_LAMBDA, tl.float32, ALIGN), leading(row, K_LD, ALIGN)
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, depth.to(tl.int32), BK):
        kk = k + tl.arange(0, BK)
        a = tl.load(a_start + kk[None, :], mask=(rm < size)[:, None] & (kk < depth)[None, :], other=0)
        if TRANSPOSED:  # Rᵀ's column is a row of R
            at = b_start + rn[:, None] * ld + kk[None, :]
        else:
            at = b_start + kk[None, :] * ld + rn[:, None]
        b = tl.load(at, mask=(rn < size)[:, None] & (kk < size)[None, :], other=0)
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def where_in_aux(row, r, c, TRANSPOSED: tl.constexpr):
    """Offset in λ of F's entries (r, c)."""
    ld = field(row, K_LD)
    if TRANSPOSED:
        at = c * ld + r
    else:
        at = r * ld + c
    return at


@triton.jit
def adam_tile(row, rm, rn, g, bias1, bias2, lr, beta1, beta2, eps, TRANSPOSED: tl.constexpr):
    """Adam's new F into K_NEW, ∂F into K_GRAD."""
    r, c, size, limit = rm[:, None], rn[None, :], field(row, K_SIZE), leading(row, K_PADDED, 16)
    inside = (r < size) & (c < size)
    at = where_in_aux(row, r, c, TRANSPOSED)
    old = tl.load(address(row, K_LAMBDA, tl.float32, 1) + at, mask=inside, other=0)
    avg = tl.load(address(row, K_AVG, tl.float32, 1) + at, mask=inside, other=0)
    avg_sq = tl.load(address(row, K_AVG_SQ, tl.float32, 1) + at, mask=inside, other=0)
    new = adam(old, g, avg, avg_sq, bias1, bias2, lr, beta1, beta2, eps)
    own = r * limit + c
    written = (r < size) & (c < limit)
    tl.store(address(row, K_NEW, tl.float32, 16) + own, tl.where(inside, new, 0.0), mask=written)
    tl.store(address(row, K_GRAD, tl.float32, 16) + own, g, mask=written)


@triton.jit
def adam(old, g, avg, avg_sq, bias1, bias2, lr, beta1, beta2, eps):
    """Adam's step, as torch.optim.Adam's: eps outside the root."""
    avg += (1 - beta1) * (g - avg)
    avg_sq = beta2 * avg_sq + (1 - beta2) * g * g
    return old - lr / bias1 * avg / (tl.sqrt(avg_sq) / tl.sqrt(bias2) + eps)


@triton.jit
def biases(row, F: tl.constexpr, given, log2beta1, log2beta2):
    """1 − β₁ᵗ and 1 − β₂ᵗ of this step: from the device's counter, or as the host gives them."""
    t, on_device = counter(row, F) + 1, tl.load(row + F) != 0
    bias1 = tl.where(on_device, one_minus_power(log2beta1, t), tl.load(given))
    return bias1, tl.where(on_device, one_minus_power(log2beta2, t), tl.load(given + 1))


@triton.jit(do_not_specialize=["tiles"])
def gradients_kernel(
    rows, schedule, corrections, squares, lr, beta1, beta2, eps, log2beta1, log2beta2, tiles,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dL and dRᵀ with Adam. Schedule: (row, i, j, number of the tile). ``corrections``: (rows, 2)."""
    rate = tl.load(lr)
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry = schedule + t * 4
        number = tl.load(entry)
        row = rows + number * FACTOR_FIELDS
        i, j = tl.load(entry + 1), tl.load(entry + 2)
        rm, rn = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN)
        bias1, bias2 = biases(row, K_STEP, corrections + number * 2, log2beta1, log2beta2)
        if field(row, K_TRANSPOSED) != 0:
            g = aux_gradient(row, rm, rn, True, PRECISION, BM, BN, BK, ALIGN)
            adam_tile(row, rm, rn, g, bias1, bias2, rate, beta1, beta2, eps, True)
        else:
            g = aux_gradient(row, rm, rn, False, PRECISION, BM, BN, BK, ALIGN)
            adam_tile(row, rm, rn, g, bias1, bias2, rate, beta1, beta2, eps, False)
        tl.store(squares + field(row, K_SLOT) + tl.load(entry + 3), tl.sum(g * g))


@triton.jit
def commit_tile(row, r, c, beta1, beta2, ok, TRANSPOSED: tl.constexpr):
    """λ and its moments at a tile of F, where ``ok``."""
    size = field(row, K_SIZE)
    inside = (r < size) & (c < size) & ok
    own, at = r * leading(row, K_PADDED, 16) + c, where_in_aux(row, r, c, TRANSPOSED)
    g = tl.load(address(row, K_GRAD, tl.float32, 16) + own, mask=inside, other=0)
    avg_at, avg_sq_at = address(row, K_AVG, tl.float32, 1) + at, address(row, K_AVG_SQ, tl.float32, 1) + at
    avg, avg_sq = tl.load(avg_at, mask=inside, other=0), tl.load(avg_sq_at, mask=inside, other=0)
    tl.store(avg_at, avg + (1 - beta1) * (g - avg), mask=inside)
    tl.store(avg_sq_at, beta2 * avg_sq + (1 - beta2) * g * g, mask=inside)
    new = tl.load(address(row, K_NEW, tl.float32, 16) + own, mask=inside, other=0)
    tl.store(address(row, K_LAMBDA, tl.float32, 1) + at, new, mask=inside)


@triton.jit(do_not_specialize=["tiles", "dot_slots", "square_slots"])
def commit_kernel(
    rows, schedule, dots, dot_slots, squares, square_slots, loss, taken, beta1, beta2, tiles,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """S, P, λ and its moments. Schedule: (row, i, j, 0: tile of F Fᵀ with j ≤ i; 1: elementwise tile of F)."""
    aux_loss, ok = decision(dots, dot_slots, squares, square_slots)
    if tl.program_id(0) == 0:
        tl.store(loss, aux_loss)
        tl.store(taken, ok)
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry = schedule + t * 4
        row = rows + tl.load(entry) * FACTOR_FIELDS
        i, j = tl.load(entry + 1), tl.load(entry + 2)
        if tl.load(entry + 3) == 0:
            rm, rn = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN)
            size, depth = field(row, K_SIZE), leading(row, K_PADDED, 16)
            start = address(row, K_NEW, tl.float32, 16)
            acc = tl.zeros([BM, BN], tl.float32)
            for k in range(0, depth.to(tl.int32), BK):
                kk = (k + tl.arange(0, BK))[None, :]
                a = tl.load(start + rm[:, None] * depth + kk, mask=(rm < size)[:, None] & (kk < depth), other=0)
                b = tl.load(start + rn[:, None] * depth + kk, mask=(rn < size)[:, None] & (kk < depth), other=0)
                acc = dot(a, b, acc, PRECISION)
            square, ld = address(row, K_SQUARE, tl.float32, 16), leading(row, K_LDSQUARE, 16)
            store_symmetric(square, ld, acc, rm, rn, i, j, size, depth, ok)
        else:
            r, c = (i * ROWS + tl.arange(0, ROWS))[:, None], (j * COLS + tl.arange(0, COLS))[None, :]
            if field(row, K_TRANSPOSED) != 0:
                commit_tile(row, r, c, beta1, beta2, ok, True)
            else:
                commit_tile(row, r, c, beta1, beta2, ok, False)
            if (i == 0) & (j == 0) & (field(row, K_FIRST) != 0):
                count(row, K_STEP, ok)
