"""The θ step over all blocks: m ← βm + (1−β)g, nat = Q m̂, θ ← θ − lr·(c·nat + wd·θ).

Launches, whatever the number of blocks: 3 for all of Kron, Kron(scale=True) and SumKron (right and left product of
``products.py``, then ``update_kernel``); 2 with normalize=None, where the update is the left product's epilogue. All
DiagKron blocks share these 3, with any normalize, and take 2 more between the two products (``diagkron.py``). All
Diagonal blocks take 1 more (``diagonal_kernel``, each block's ‖nat‖²), and share the update.

Everything is decided on the device. Non-finite numbers are found by the blocks' sums of squares, in ``update_kernel``
before it writes. With normalize=None no launch lies between the last product and the update: the sums of the first
product decide, and elements of nat that are not finite all the same are left out one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference.thin import Matrix
from .configurations import ELEMENTWISE
from .diagkron import launch_between
from .launch import launch
from .plan import Plan, counts_on_device, plan_of
from .products import left_kernel, left_tile, matrix, outer, right_kernel, sums
from .rows import DTYPES, FACTORED, kind, kinds_of
from .shared import (
    F_A,
    F_COLS,
    F_DIAGONAL,
    F_FIRST,
    F_INDEX,
    F_LDA,
    F_LDX,
    F_LR,
    F_LRB,
    F_M,
    F_N,
    F_NP,
    F_OUT,
    F_SLOT,
    F_SLOTS,
    F_STEP,
    F_W,
    F_WB,
    F_WBROW,
    F_X,
    F_XCOLS,
    FIELDS,
    H_DECAY,
    H_DECAYB,
    H_KEEP,
    H_LR,
    H_LRB,
    H_RATE,
    H_SIZE,
    H_TAKE,
    HYPERS,
    address,
    all_finite,
    correction,
    count,
    field,
    finite,
    gradient,
    leading,
    parameter,
    rate,
    total,
)
from .symmetric import refresh_all
from .table import upload, workspace

if TYPE_CHECKING:
    from ..blocks import Block


@triton.jit
def diagonal_product(
    row, hyper, r, c, inside, AFTER: tl.constexpr, G: tl.constexpr, GENERAL: tl.constexpr, ALIGN: tl.constexpr
):
    """d²∘m̂, or d²∘g with momentum AFTER."""
    d = matrix(row, F_A, F_LDA, r, c, inside, field(row, F_N), 1)
    x = gradient(row, r, c, inside, G, GENERAL, ALIGN)
    if not AFTER:
        m = matrix(row, F_X, F_LDX, r, c, inside, field(row, F_N), 1)
        x = tl.load(hyper + H_KEEP) * m + tl.load(hyper + H_TAKE) * x
    return d * d * x


@triton.jit(do_not_specialize=["tiles", "slots"])
def diagonal_kernel(
    rows, hypers, schedule, corrections, partials, slots, tiles,
    SUMS: tl.constexpr, AFTER: tl.constexpr, G: tl.constexpr, GENERAL: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The sums of Diagonal blocks. Schedule: (row, tile of rows, tile of columns, number of the tile in its block)."""
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry = schedule + t * 4
        row = rows + tl.load(entry) * FIELDS
        hyper = hypers + tl.load(entry) * HYPERS
        i, j = tl.load(entry + 1), tl.load(entry + 2)
        r, c = (i * ROWS + tl.arange(0, ROWS))[:, None], (j * COLS + tl.arange(0, COLS))[None, :]
        inside = r < field(row, F_M)
        corrected = correction(row, hyper)
        if (i == 0) & (j == 0) & (field(row, F_FIRST) != 0):
            tl.store(corrections + field(row, F_INDEX), corrected)
        q = diagonal_product(row, hyper, r, c, inside, AFTER, G, GENERAL, ALIGN)
        slot = partials + field(row, F_SLOT) + tl.load(entry + 3)
        sums(row, hyper, r, c, inside, q, corrected, slot, slots, SUMS, AFTER, G, GENERAL, ALIGN, 1)


@triton.jit
def move(
    row, hyper, r, c, inside, q, factor, ok,
    AFTER: tl.constexpr, G: tl.constexpr, W: tl.constexpr, GENERAL: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_X: tl.constexpr,
):  # fmt: skip
    """Write m and θ at a tile, from q = Q m̂ (Q g with momentum AFTER) and factor = c/correction, where ``ok``."""
    m_at = address(row, F_X, tl.float32, ALIGN_X) + r * leading(row, F_LDX, ALIGN_X) + c
    limit = leading(row, F_XCOLS, ALIGN_X)
    m = tl.load(m_at, mask=inside & (c < limit), other=0)
    if AFTER:
        x, nat = q, tl.load(hyper + H_KEEP) * m + tl.load(hyper + H_TAKE) * q
    else:
        x, nat = gradient(row, r, c, inside, G, GENERAL, ALIGN), q
    tl.store(m_at, m + tl.load(hyper + H_RATE) * (x - m), mask=inside & (c < limit) & ok)
    nat = nat * factor
    cols = field(row, F_COLS)
    weight = inside & (c < leading(row, F_COLS, ALIGN)) & ok & (field(row, F_W) != 0)
    w_at = parameter(row, r, c, GENERAL, W, ALIGN)
    w = tl.load(w_at, mask=weight, other=0).to(tl.float32)
    lr = rate(row, hyper, F_LR, H_LR)
    tl.store(w_at, (w - lr * (nat + tl.load(hyper + H_DECAY) * w)).to(W), mask=weight)
    bias = inside & (c == cols) & ok & (field(row, F_WB) != 0)
    b_at = address(row, F_WB, W, 1) + r * field(row, F_WBROW) + (c - cols)
    b = tl.load(b_at, mask=bias, other=0).to(tl.float32)
    lr = rate(row, hyper, F_LRB, H_LRB)
    tl.store(b_at, (b - lr * (nat + tl.load(hyper + H_DECAYB) * b)).to(W), mask=bias)


@triton.jit(do_not_specialize=["tiles", "slots"])
def update_kernel(
    rows, hypers, schedule, corrections, partials, slots, kappa, norms, taken, tiles,
    RULE: tl.constexpr,  # "rms", "trust" or "none"
    AFTER: tl.constexpr, DIAGONAL: tl.constexpr, G: tl.constexpr, W: tl.constexpr, GENERAL: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_X: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """m and θ, from nat. Schedule: (row, tile of rows, tile of columns, unused).

    norms (blocks,): ‖nat‖; taken: whether the step was, a bool. DIAGONAL: some rows compute nat here.
    """
    ok = all_finite(partials, slots, 1024)
    trust = 1.0
    if RULE == "trust":
        length = tl.maximum(total(partials + slots, slots, 1024), 1.1754943508222875e-38)
        trust = tl.minimum(tl.sqrt(kappa / length), 1.0)
    if tl.program_id(0) == 0:
        tl.store(taken, ok)
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry = schedule + t * 4
        row = rows + tl.load(entry) * FIELDS
        hyper = hypers + tl.load(entry) * HYPERS
        i, j = tl.load(entry + 1), tl.load(entry + 2)
        r, c = (i * ROWS + tl.arange(0, ROWS))[:, None], (j * COLS + tl.arange(0, COLS))[None, :]
        inside = r < field(row, F_M)
        corrected = tl.load(corrections + field(row, F_INDEX))
        own, slot = field(row, F_SLOTS), field(row, F_SLOT)
        norm = tl.sqrt(total(partials + slot, own, 256)) / corrected
        factor = trust / corrected
        if RULE == "rms":
            moving = (norm > 0) & (total(partials + slots + slot, own, 256) > 0)
            factor = tl.where(moving, tl.load(hyper + H_SIZE) / tl.where(moving, norm, 1.0), 0.0) / corrected
        if (i == 0) & (j == 0) & (field(row, F_FIRST) != 0):
            tl.store(norms + field(row, F_INDEX), norm)
            count(row, F_STEP, ok)
        if DIAGONAL:
            if field(row, F_DIAGONAL) != 0:
                q = diagonal_product(row, hyper, r, c, inside, AFTER, G, GENERAL, ALIGN)
            else:
                np = field(row, F_NP)
                q = tl.load(address(row, F_OUT, tl.float32, 1) + r * np + c, mask=inside & (c < np), other=0)
        else:
            np = leading(row, F_NP, 16)
            q = tl.load(address(row, F_OUT, tl.float32, 16) + r * np + c, mask=inside & (c < np), other=0)
        move(row, hyper, r, c, inside, q, factor, ok, AFTER, G, W, GENERAL, ALIGN, ALIGN_X)


@triton.jit
def finish(partials, slots, ranges, blocks, most, corrections, norms, taken):
    """‖nat‖ of each block and whether all are finite. ``ranges`` (blocks, 2): first slot, slots; ``most`` of them."""
    tl.store(taken, all_finite(partials, slots, 1024))
    for first in range(0, blocks, 32):
        b = first + tl.arange(0, 32)
        start = tl.load(ranges + 2 * b, mask=b < blocks, other=0)
        own = tl.load(ranges + 2 * b + 1, mask=b < blocks, other=0)
        acc = tl.zeros([32], tl.float32)
        for slot in range(0, most, 32):
            at = (slot + tl.arange(0, 32))[None, :]
            acc += tl.sum(tl.load(partials + start[:, None] + at, mask=at < own[:, None], other=0), 1)
        corrected = tl.load(corrections + b, mask=b < blocks, other=1)
        tl.store(norms + b, tl.sqrt(acc) / corrected, mask=b < blocks)


@triton.jit(do_not_specialize=["tiles", "slots", "checked", "blocks", "most"])
def fused_kernel(
    rows, hypers, schedule, corrections, checks, checked, partials, slots, ranges, blocks, most, norms, taken, arrived,
    tiles,
    AFTER: tl.constexpr, SCALED: tl.constexpr, G: tl.constexpr, W: tl.constexpr, GENERAL: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_X: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """nat = P X, and m and θ moved in the epilogue. Schedule: (row, tile of m, tile of n, number of the tile).

    Nothing is written where the first product is not finite. The program that comes last adds up the norms, in the
    same order whichever it is; ``arrived`` counts them and is 0 again after it.
    """
    ok = all_finite(checks, checked, 1024)
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry = schedule + t * 4
        row = rows + tl.load(entry) * FIELDS
        hyper = hypers + tl.load(entry) * HYPERS
        i, j = tl.load(entry + 1), tl.load(entry + 2)
        q = left_tile(row, i, j, PRECISION, BM, BN, BK)
        r, c = (i * BM + tl.arange(0, BM))[:, None], (j * BN + tl.arange(0, BN))[None, :]
        inside = r < field(row, F_M)
        if SCALED:
            q = q * outer(row, r, c, inside)
        corrected = tl.load(corrections + field(row, F_INDEX))
        slot = partials + field(row, F_SLOT) + tl.load(entry + 3)
        sums(row, hyper, r, c, inside, q, corrected, slot, slots, "norm", AFTER, G, GENERAL, ALIGN, ALIGN_X)
        move(row, hyper, r, c, inside & finite(q), q, 1 / corrected, ok, AFTER, G, W, GENERAL, ALIGN, ALIGN_X)
        if (i == 0) & (j == 0):
            count(row, F_STEP, ok)
    tl.debug_barrier()  # all of this program's sums are written before it counts as arrived
    before = tl.atomic_add(arrived, 1, sem="acq_rel")
    if before == tl.num_programs(0) - 1:
        finish(partials, slots, ranges, blocks, most, corrections, norms, taken)
        tl.store(arrived, 0)


def run_fused(plan: Plan) -> None:
    """The launches with normalize=None, of Kron's kind alone: what would be a third is in the second's epilogue."""
    device, group = plan.device, plan.groups[0]
    rows, values = group.table(device), plan.hypers(group)
    shared = {"PRECISION": group.precision, "SCALED": group.scaled, **group.constants(), **group.config._asdict()}
    entries, checked = group.right(device)
    checks = torch.empty(checked, dtype=torch.float32, device=device)
    launch(
        right_kernel, checked, rows, values, entries, plan.corrections, checks, device=device,
        SOURCE="g" if plan.after else "mg", COUNT=True, CHECK=True, **shared,
    )  # fmt: skip
    entries, tiles = group.left(device)
    ranges = tuple(x for pair in group.ranges for x in pair)
    arrived = workspace(plan.blocks[0]).scratch("arrived", 1).view(torch.int32)
    launch(
        fused_kernel, tiles, rows, values, entries, plan.corrections, checks, checked, plan.partials, plan.slots,
        upload(ranges, torch.int32, device), len(group.ranges), max(n for _, n in group.ranges), plan.norms, plan.ok,
        arrived, device=device, AFTER=plan.after, W=DTYPES[group.rows.W], **shared,
    )  # fmt: skip


def run(plan: Plan, kappa: float) -> None:
    """The launches."""
    device, rule = plan.device, plan.normalize or "none"
    scalars = (plan.corrections, plan.partials, plan.slots)
    sums = {"rms": "rms", "trust": "trust", "none": "norm"}[rule]
    tables = [(g, g.table(device), plan.hypers(g)) for g in plan.groups]
    for group, rows, values in tables:
        constants = group.constants()
        shared = {"PRECISION": group.precision, "SCALED": group.scaled, **group.config._asdict()}
        entries, count = group.right(device)
        launch(
            right_kernel, count, rows, values, entries, plan.corrections, plan.corrections, device=device,
            SOURCE="g" if plan.after else "mg", COUNT=True, CHECK=False, **constants, **shared,
        )  # fmt: skip
        launch_between(group.between(device), device)
        entries, count = group.left(device)
        launch(
            left_kernel, count, rows, values, entries, *scalars, device=device,
            SUMS=sums, AFTER=plan.after, SQUARED=False, **constants, **shared,
        )  # fmt: skip
    wide = dict(zip(("ROWS", "COLS", "num_warps"), ELEMENTWISE, strict=True))
    for group, rows, values in tables:
        constants = group.constants()
        entries, count = group.sums(device)
        constants.pop("ALIGN_X")
        launch(
            diagonal_kernel, count, rows, values, entries, *scalars, device=device, per_processor=4,
            SUMS=sums, AFTER=plan.after, **constants, **wide,
        )  # fmt: skip
    for group, rows, values in tables:
        entries, count = group.update(device)
        launch(
            update_kernel, count, rows, values, entries, *scalars, kappa, plan.norms, plan.ok, device=device,
            per_processor=4, RULE=rule, AFTER=plan.after, DIAGONAL=bool(group.diagonal), W=DTYPES[group.rows.W],
            **group.constants(), **wide,
        )  # fmt: skip


def theta_step(
    blocks: Sequence[Block],
    gs: Sequence[Matrix],
    *,
    momentum: str = "before",
    nesterov: bool = False,
    normalize: str | None = "rms",
    kappa: float = 1e-3,
    capturable: bool = False,
) -> tuple[Tensor, Tensor]:
    """As ``reference.theta_step``; nothing is decided on the host, which only waits where it counts the steps.

    Blocks that the kernels do not cover take their steps by the reference's functions, with the same norms, trust
    region and decision.
    """
    if not any(kind(b) for b in blocks):
        return reference.theta_step(
            blocks, gs, momentum=momentum, nesterov=nesterov, normalize=normalize, kappa=kappa, capturable=capturable
        )
    how = momentum, 2 if nesterov else 1, normalize, capturable
    plan = plan_of(blocks, gs, lambda: kinds_of(blocks), *how)
    refresh_all([b for b, k in zip(blocks, plan.kinds, strict=True) if k in FACTORED])
    plan.add_reference()
    if plan.fuses:
        run_fused(plan)
    else:
        run(plan, kappa)
    plan.finish_reference(kappa)
    norms, ok = plan.end()
    raised: list[Tensor] = []
    for block, k in zip(blocks, plan.kinds, strict=True):
        if k is None:
            continue
        block.product_version = None  # m has moved on
        raised += [p.param for p, g in zip(block.parts, block.grads, strict=True) if g is not None]
        raised.append(block.momentum)
        if counts_on_device(block, capturable):
            raised.append(block.step)
        else:
            block.step.add_(ok.to(block.step.device))
    torch.autograd.graph.increment_version(raised)
    return norms, ok
