"""Kernels of the θ step: sums of Diagonal blocks, the update of m and θ, and that update in a product's epilogue."""

from __future__ import annotations

import triton
import triton.language as tl

from .access import (
    address,
    diagonal_matrix,
    field,
    gradient,
    increment,
    last_number,
    leading,
    learning_rate,
    matrix,
    momentum_correction,
    outer_diagonal,
    scheduled_step,
    tile_grid,
    told_address,
    weight_pointers,
)
from .arithmetic import all_finite, finite, last_to_arrive, total
from .products import add_up, left_tile, store_sums, summed_tiles
from .row_layout import F, H


@triton.jit
def diagonal_product(row, hyper, r, c, inside, m, g, AFTER: tl.constexpr):
    """d²∘m̂, or d²∘g with momentum AFTER."""
    d, x = diagonal_matrix(row, r, c, inside), g
    if not AFTER:
        x = tl.load(hyper + H.KEEP) * m + tl.load(hyper + H.TAKE) * g
    return d * d * x


@triton.jit(do_not_specialize=["tiles", "slots", "blocks"])
def diagonal_kernel(
    rows, schedule, corrections, partials, slots, sums, blocks, arrived, tiles,
    SUMS: tl.constexpr, AFTER: tl.constexpr, G: tl.constexpr, GENERAL: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The sums of Diagonal blocks, as ``left_kernel``'s.

    Schedule: (row, tile of rows, tile of columns, number of the tile in its block).
    """
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry, row, hyper, i, j = scheduled_step(schedule, t, rows)
        r, c = tile_grid(i, j, ROWS, COLS)
        inside = r < field(row, F.M)
        correction = momentum_correction(row, hyper)
        if (i == 0) & (j == 0) & (field(row, F.FIRST) != 0):
            tl.store(corrections + field(row, F.INDEX), correction)
        m = matrix(row, F.X, F.LDX, r, c, inside, field(row, F.N), 1)
        g = gradient(row, r, c, inside, G, GENERAL, ALIGN)
        q = diagonal_product(row, hyper, r, c, inside, m, g, AFTER)
        slot = partials + field(row, F.SLOT) + last_number(entry)
        store_sums(hyper, q, m, g, correction, slot, slots, SUMS, AFTER)
        add_up(row, partials, slots, sums, blocks, arrived, SUMS != "norm")


@triton.jit
def stored_product(
    row, hyper, r, c, inside, AFTER: tl.constexpr, DIAGONAL: tl.constexpr,
    G: tl.constexpr, GENERAL: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Q m̂, or Q g with momentum AFTER, where earlier launches put it; DIAGONAL: some rows compute it here."""
    if DIAGONAL:
        if field(row, F.DIAGONAL) != 0:
            m, g = 0.0, gradient(row, r, c, inside, G, GENERAL, ALIGN)
            if not AFTER:
                m = matrix(row, F.X, F.LDX, r, c, inside, field(row, F.N), 1)
            q = diagonal_product(row, hyper, r, c, inside, m, g, AFTER)
        else:
            np = field(row, F.NP)
            q = tl.load(told_address(row, F.OUT, tl.float32, 1) + r * np + c, mask=inside & (c < np), other=0)
    else:
        np = leading(row, F.NP, 16)
        q = tl.load(told_address(row, F.OUT, tl.float32, 16) + r * np + c, mask=inside & (c < np), other=0)
    return q


@triton.jit
def polar_or(row, r, c, inside, nat):
    """A tile of the polar factor where the row has one, else of nat."""
    there, np = field(row, F.POLAR) != 0, leading(row, F.NP, 16)
    at = address(row, F.POLAR, tl.float32, 16) + r * np + c
    return tl.where(there, tl.load(at, mask=inside & (c < np) & there, other=0), nat)


@triton.jit
def update_tile(
    row, hyper, r, c, inside, q, factor, ok,
    AFTER: tl.constexpr, POLAR: tl.constexpr, G: tl.constexpr, W: tl.constexpr, GENERAL: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_X: tl.constexpr,
):  # fmt: skip
    """Write m and θ at a tile, from q = Q m̂ (Q g with momentum AFTER) and what multiplies nat, where ``ok``.

    POLAR: the polar factors of some rows take nat's place.
    """
    m_at = told_address(row, F.X, tl.float32, ALIGN_X) + r * leading(row, F.LDX, ALIGN_X) + c
    limit = leading(row, F.X_COLS, ALIGN_X)
    m = tl.load(m_at, mask=inside & (c < limit), other=0)
    if AFTER:
        x, nat = q, tl.load(hyper + H.KEEP) * m + tl.load(hyper + H.TAKE) * q
    else:
        x, nat = gradient(row, r, c, inside, G, GENERAL, ALIGN), q
    if POLAR:
        nat = polar_or(row, r, c, inside, nat)
    tl.store(m_at, m + tl.load(hyper + H.RATE) * (x - m), mask=inside & (c < limit) & ok)
    nat = nat * factor
    cols = field(row, F.COLS)
    weight = inside & (c < leading(row, F.COLS, ALIGN)) & ok & (field(row, F.WEIGHT) != 0)
    w_at = weight_pointers(row, r, c, GENERAL, W, ALIGN)
    w = tl.load(w_at, mask=weight, other=0).to(tl.float32)
    lr = learning_rate(row, hyper, F.LR, H.LR)
    tl.store(w_at, (w - lr * (nat + tl.load(hyper + H.DECAY) * w)).to(W), mask=weight)
    bias = inside & (c == cols) & ok & (field(row, F.BIAS) != 0)
    b_at = address(row, F.BIAS, W, 1) + r * field(row, F.BIAS_ROW) + (c - cols)
    b = tl.load(b_at, mask=bias, other=0).to(tl.float32)
    lr = learning_rate(row, hyper, F.BIAS_LR, H.BIAS_LR)
    tl.store(b_at, (b - lr * (nat + tl.load(hyper + H.BIAS_DECAY) * b)).to(W), mask=bias)


@triton.jit(do_not_specialize=["tiles", "blocks"])
def update_kernel(
    rows, schedule, corrections, sums, blocks, kappa, norms, taken, tiles,
    RULE: tl.constexpr,  # "rms", "spectral", "trust" or "none"
    AFTER: tl.constexpr, DIAGONAL: tl.constexpr, G: tl.constexpr, W: tl.constexpr, GENERAL: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_X: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """m and θ, from nat. Schedule: (row, tile of rows, tile of columns, unused).

    sums (2, blocks): as ``left_kernel`` adds them up. norms (blocks,): ‖nat‖; taken: whether the step was, a bool.
    DIAGONAL: some rows compute nat here.
    """
    ok = all_finite(sums, blocks, 256)
    trust = 1.0
    if RULE == "trust":
        length = tl.maximum(total(sums + blocks, blocks, 256), 1.1754943508222875e-38)
        trust = tl.minimum(tl.sqrt(kappa / length), 1.0)
    if tl.program_id(0) == 0:
        tl.store(taken, ok)
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _, row, hyper, i, j = scheduled_step(schedule, t, rows)
        r, c = tile_grid(i, j, ROWS, COLS)
        inside = r < field(row, F.M)
        index = field(row, F.INDEX)
        correction = tl.load(corrections + index)
        norm = tl.sqrt(tl.load(sums + index)) / correction
        factor = trust / correction
        if RULE == "rms" or RULE == "spectral":
            moving = (norm > 0) & (tl.load(sums + blocks + index) > 0)
            length = tl.load(hyper + H.RMS) * tl.sqrt(field(row, F.ENTRIES).to(tl.float32))
            length = tl.where(moving, length, 0.0)
            factor = length / tl.where(moving, norm, 1.0) / correction
            if RULE == "spectral":
                factor = tl.where(field(row, F.POLAR) != 0, length, factor)
        if (i == 0) & (j == 0) & (field(row, F.FIRST) != 0):
            tl.store(norms + index, norm)
            increment(row, F.STEP, ok)
        q = stored_product(row, hyper, r, c, inside, AFTER, DIAGONAL, G, GENERAL, ALIGN)
        update_tile(
            row, hyper, r, c, inside, q, factor, ok, AFTER, RULE == "spectral", G, W, GENERAL, ALIGN, ALIGN_X
        )  # fmt: skip


@triton.jit(do_not_specialize=["tiles", "slots", "blocks"])
def fused_kernel(
    rows, schedule, corrections, broken, partials, slots, sums, blocks, arrived, norms, taken, tiles,
    AFTER: tl.constexpr, SCALED: tl.constexpr, G: tl.constexpr, W: tl.constexpr, GENERAL: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_X: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """nat = P X, and m and θ moved in the epilogue. Schedule: (row, tile of m, tile of n, number of the tile).

    Nothing is written where the first product is not finite, as ``broken`` tells, which is 0 again after the launch.
    arrived (blocks + 1,): zeros; the last counts programs.
    """
    ok = tl.load(broken) == 0
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry, row, hyper, i, j = scheduled_step(schedule, t, rows)
        q = left_tile(row, i, j, PRECISION, BM, BN, BK)
        r, c = tile_grid(i, j, BM, BN)
        inside = r < field(row, F.M)
        if SCALED:
            q = q * outer_diagonal(row, r, c, inside)
        correction = tl.load(corrections + field(row, F.INDEX))
        slot = partials + field(row, F.SLOT) + last_number(entry)
        m, g = summed_tiles(row, r, c, inside, "norm", AFTER, G, GENERAL, ALIGN, ALIGN_X)
        store_sums(hyper, q, m, g, correction, slot, slots, "norm", AFTER)
        update_tile(
            row, hyper, r, c, inside & finite(q), q, 1 / correction, ok, AFTER, False, G, W, GENERAL, ALIGN, ALIGN_X
        )  # fmt: skip
        if (i == 0) & (j == 0):
            increment(row, F.STEP, ok)
        store_norm(row, partials, sums, arrived, corrections, norms)
    if last_to_arrive(arrived, blocks, tl.num_programs(0)):
        tl.store(taken, all_finite(sums, blocks, 256))
        tl.store(broken, 0)


@triton.jit
def store_norm(row, partials, sums, arrived, corrections, norms):
    """Add up ‖nat‖² of a row's block, where this is its last tile."""
    index, count = field(row, F.INDEX), field(row, F.SLOTS)
    if last_to_arrive(arrived, index, count):
        square = total(partials + field(row, F.SLOT), count, 256)
        tl.store(sums + index, square)
        tl.store(norms + index, tl.sqrt(square) / tl.load(corrections + index))
