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

from .access import (
    address,
    counter,
    field,
    gradient,
    gradient_scale,
    last_number,
    leading,
    matrix,
    scheduled,
    tile_grid,
    tile_indices,
)
from .arithmetic import (
    adam,
    dot,
    first_moment,
    last_to_arrive,
    one_minus_power,
    second_moment,
    total,
)
from .factors import aux_offsets
from .products import add_up, operand
from .row_layout import F, K

# A schedule of products_kernel has as its last number kind·KIND_STRIDE + a term, or + a number among the sums.
KIND_STRIDE = tl.constexpr(1 << 20)
RIGHT_PRODUCT = tl.constexpr(0)  # wS
LEFT_PRODUCT = tl.constexpr(1)  # Pw
DOT_PRODUCTS = tl.constexpr(2)  # sums of an elementwise tile


@triton.jit
def rescaling(dot_sums, blocks, RESCALE: tl.constexpr):
    """α = uᵀv/vᵀ(F+γI)v, or 1; sampled Hessians may have negative curvature."""
    alpha = 1.0
    if RESCALE:
        uQu, vFv = total(dot_sums, blocks, 256), total(dot_sums + blocks, blocks, 256)
        alpha = tl.where(vFv > 0, uQu / tl.where(vFv > 0, vFv, 1.0), 1.0)
    return alpha


@triton.jit
def dots_tile(
    row, r, c, inside, slot, dot_slots, damping, STORE: tl.constexpr,
    G: tl.constexpr, GENERAL: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A tile's part of uᵀv and vᵀ(F+γI)v; with STORE, u as our own matrix and its transpose."""
    n = field(row, F.N)
    u = gradient_scale(row) * gradient(row, r, c, inside, G, GENERAL, ALIGN)
    v = matrix(row, F.V, F.LDV, r, c, inside, n, 1)
    fv = matrix(row, F.X, F.LDX, r, c, inside, n, 1)
    tl.store(slot, tl.sum(u * v))
    tl.store(slot + dot_slots, tl.sum(v * (fv + damping * v)))
    if STORE:
        np, mp = leading(row, F.NP, 16), leading(row, F.MP, 16)
        tl.store(address(row, F.U, tl.float32, 16) + r * np + c, u, mask=inside & (c < np))
        at = address(row, F.UT, tl.float32, 16) + tl.trans(c) * mp + tl.trans(r)
        tl.store(at, tl.trans(u), mask=tl.trans((c < n) & (r < mp)))
    return u, v, fv


@triton.jit
def product_tile(
    row, i, j, term, alpha, damping, LEFT: tl.constexpr, PRECONDITION: tl.constexpr,
    SOURCE: tl.constexpr, G: tl.constexpr, GENERAL: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_X: tl.constexpr, ALIGN_V: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """LEFT: P w, else S wᵀ; stored transposed, as the next product needs it, but S wᵀ for a PRECONDITION as it is."""
    m, n, np, mp = field(row, F.M), field(row, F.N), leading(row, F.NP, 16), leading(row, F.MP, 16)
    stacked = field(row, F.TERMS) * mp
    rm, rn = tile_indices(i, j, BM, BN)
    if LEFT:
        rows, depth = m, mp
        a_start = address(row, F.P, tl.float32, 16) + term * mp + rm[:, None] * stacked
    else:
        rows, depth = n, np
        a_start = address(row, F.S, tl.float32, 16) + term * n * np + rm[:, None] * np
    take = -gradient_scale(row)
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, depth.to(tl.int32), BK):
        kk = k + tl.arange(0, BK)
        a = tl.load(a_start + kk[None, :], mask=(rm < rows)[:, None] & (kk < depth)[None, :], other=0)
        if LEFT:  # wᵀ: rows of the tile are columns of w
            r, c = kk[None, :], rn[:, None]
        else:
            r, c = rn[:, None], kk[None, :]
        b = operand(
            row, r, c, r < m, alpha, take, alpha * damping, SOURCE, False, G, GENERAL, ALIGN, ALIGN_X, ALIGN_V
        )  # fmt: skip
        acc = dot(a, b, acc, PRECISION)
    if PRECONDITION:
        at = address(row, F.XT, tl.float32, 16) + term * mp + rm[:, None] * stacked + rn[None, :]
        tl.store(at, acc, mask=(rm < n)[:, None] & (rn < mp)[None, :])
    elif LEFT:
        at = address(row, F.XT, tl.float32, 16) + term * mp + rn[:, None] * stacked + rm[None, :]
        tl.store(at, tl.trans(acc), mask=(rn < n)[:, None] & (rm < mp)[None, :])
    else:
        at = address(row, F.WS, tl.float32, 16) + term * m * np + rn[:, None] * np + rm[None, :]
        tl.store(at, tl.trans(acc), mask=(rn < m)[:, None] & (rm < np)[None, :])


@triton.jit(do_not_specialize=["tiles", "dot_slots", "blocks"])
def products_kernel(
    rows, schedule, dots, dot_slots, dot_sums, blocks, arrived, damping, tiles,
    RESCALE: tl.constexpr, PRECONDITION: tl.constexpr, SOURCE: tl.constexpr,
    G: tl.constexpr, GENERAL: tl.constexpr, ALIGN: tl.constexpr, ALIGN_X: tl.constexpr, ALIGN_V: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """wS, (Pw)ᵀ and sums, of each block added up by its last tile; for a PRECONDITION S wᵀ and sums.

    Schedule: (row, i, j, kind·KIND_STRIDE + term).
    """
    alpha = rescaling(dot_sums, blocks, RESCALE)
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry, _, row, i, j = scheduled(schedule, t, rows, F.LENGTH)
        code = last_number(entry)
        kind, term = code // KIND_STRIDE, code % KIND_STRIDE
        if kind == RIGHT_PRODUCT:
            product_tile(
                row, i, j, term, alpha, damping, False, PRECONDITION,
                SOURCE, G, GENERAL, ALIGN, ALIGN_X, ALIGN_V, PRECISION, BM, BN, BK,
            )  # fmt: skip
        elif kind == LEFT_PRODUCT:
            if not PRECONDITION:
                product_tile(
                    row, i, j, term, alpha, damping, True, False,
                    SOURCE, G, GENERAL, ALIGN, ALIGN_X, ALIGN_V, PRECISION, BM, BN, BK,
                )  # fmt: skip
        else:
            r, c = tile_grid(i, j, ROWS, COLS)
            slot = dots + field(row, F.SLOT) + term
            dots_tile(row, r, c, r < field(row, F.M), slot, dot_slots, damping, True, G, GENERAL, ALIGN)
            add_up(row, dots, dot_slots, dot_sums, blocks, arrived, True)


@triton.jit
def aux_gradient(
    row, rm, rn, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A tile of ∂F = (M + Mᵀ) F, from our M + Mᵀ and λ's F = L or, TRANSPOSED, Rᵀ."""
    size, depth = leading(row, K.SIZE, ALIGN), leading(row, K.PADDED, 16)
    a_start = address(row, K.SYM, tl.float32, 16) + rm[:, None] * depth
    b_start, ld = address(row, K.AUX, tl.float32, ALIGN), leading(row, K.LD_AUX, ALIGN)
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
def adam_tile(row, rm, rn, g, correction1, correction2, lr, beta1, beta2, eps, TRANSPOSED: tl.constexpr):
    """Adam's new F into K.NEW, ∂F into K.GRAD."""
    r, c, size, limit = rm[:, None], rn[None, :], field(row, K.SIZE), leading(row, K.PADDED, 16)
    inside = (r < size) & (c < size)
    at = aux_offsets(row, r, c, TRANSPOSED)
    old = tl.load(address(row, K.AUX, tl.float32, 1) + at, mask=inside, other=0)
    avg = tl.load(address(row, K.AVG, tl.float32, 1) + at, mask=inside, other=0)
    avg_sq = tl.load(address(row, K.AVG_SQ, tl.float32, 1) + at, mask=inside, other=0)
    avg, avg_sq = first_moment(avg, g, beta1), second_moment(avg_sq, g, beta2)
    new = adam(old, avg, avg_sq, correction1, correction2, lr, eps)
    ours = r * limit + c
    written = (r < size) & (c < limit)
    tl.store(address(row, K.NEW, tl.float32, 16) + ours, tl.where(inside, new, 0.0), mask=written)
    tl.store(address(row, K.GRAD, tl.float32, 16) + ours, g, mask=written)


@triton.jit
def adam_corrections(row, FIELD: tl.constexpr, given, log2beta1, log2beta2):
    """1 − β₁ᵗ and 1 − β₂ᵗ of this step: from the device's counter, or as the host gives them."""
    t, on_device = counter(row, FIELD) + 1, tl.load(row + FIELD) != 0
    correction1 = tl.where(on_device, one_minus_power(log2beta1, t), tl.load(given))
    return correction1, tl.where(on_device, one_minus_power(log2beta2, t), tl.load(given + 1))


@triton.jit(do_not_specialize=["tiles"])
def gradients_kernel(
    rows, schedule, corrections, squares, square_sums, arrived, lr, beta1, beta2, eps, log2beta1, log2beta2, tiles,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dL and dRᵀ with Adam. Schedule: (row, i, j, number of the tile). ``corrections``: (rows, 2).

    square_sums: ‖∂F‖² of each factor at its INDEX, from its tiles' ``squares``. arrived: zeros.
    """
    rate = tl.load(lr)
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry, number, row, i, j = scheduled(schedule, t, rows, K.LENGTH)
        rm, rn = tile_indices(i, j, BM, BN)
        correction1, correction2 = adam_corrections(row, K.STEP, corrections + number * 2, log2beta1, log2beta2)
        if field(row, K.TRANSPOSED) != 0:
            g = aux_gradient(row, rm, rn, True, PRECISION, BM, BN, BK, ALIGN)
            adam_tile(row, rm, rn, g, correction1, correction2, rate, beta1, beta2, eps, True)
        else:
            g = aux_gradient(row, rm, rn, False, PRECISION, BM, BN, BK, ALIGN)
            adam_tile(row, rm, rn, g, correction1, correction2, rate, beta1, beta2, eps, False)
        mine, count = squares + field(row, K.SLOT), field(row, K.SLOTS)
        tl.store(mine + last_number(entry), tl.sum(g * g))
        if last_to_arrive(arrived, field(row, K.INDEX), count):
            tl.store(square_sums + field(row, K.INDEX), total(mine, count, 256))
