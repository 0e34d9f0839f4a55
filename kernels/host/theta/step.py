"""The θ step over all blocks: m ← βm + (1−β)g, nat = Q m̂, θ ← θ − lr·(c·nat + wd·θ).

Launches, whatever the number of blocks: 3 for all of Kron, Kron(scale=True) and SumKron (right and left product of
``device/products.py``, then ``update_kernel``); 2 with normalize=None, where the update is the left product's epilogue.
All DiagKron blocks share these 3, with any normalize, and take 2 more between the two products (``diagkron.py``). All
Diagonal blocks take 1 more (``diagonal_kernel``, each block's ‖nat‖²), and share the update. normalize="spectral" takes
19 more before the update: nat/‖nat‖ of all blocks of whichever kind, then six iterations of 3 (``device/polar.py``).

Everything is decided on the device. Non-finite numbers are found by the blocks' sums of squares, in ``update_kernel``
before it writes. With normalize=None no launch lies between the last product and the update: the sums of the first
product decide, and elements of nat that are not finite all the same are left out one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....algebra.matrix import Matrix
from ....backends import reference
from ....backends.protocol import ThetaOptions
from ....model.block import Block, advance
from ...device.polar import unit_kernel
from ...device.products import left_kernel, right_kernel
from ...device.theta_step import diagonal_kernel, fused_kernel, update_kernel
from ..configurations import COPY, ELEMENTWISE
from ..coverage import FACTORED, counts_on_device, kind, kinds_of
from ..diagkron import launch_core
from ..launch import DTYPES, launch
from ..refresh import refresh_stale
from ..state import workspace_of
from ..tables.uploads import upload_rows
from .plan import ThetaPlan, plan_of


def run_fused(plan: ThetaPlan) -> None:
    """The launches with normalize=None, of Kron's kind alone: what would be a third is in the second's epilogue."""
    device, group = plan.device, plan.groups[0]
    rows, hyperparameters = group.table, plan.hyperparameters(group)
    shared = group.product_constants()
    entries, checked = group.right_tiles
    checks = torch.empty(checked, dtype=torch.float32, device=device)
    launch(
        right_kernel, checked, rows, hyperparameters, entries, plan.corrections, checks, device=device,
        SOURCE="g" if plan.after else "mg", COUNT=True, CHECK=True, **shared,
    )  # fmt: skip
    entries, tiles = group.left_tiles
    arrived = workspace_of(plan.blocks[0]).scratch("arrived", 1).view(torch.int32)
    launch(
        fused_kernel, tiles, rows, hyperparameters, entries, plan.corrections, checks, checked, plan.partials,
        plan.slots, upload_rows(group.slots, torch.int32, device), len(group.slots), max(n for _, n in group.slots),
        plan.norms, plan.ok, arrived, device=device, AFTER=plan.after, W=DTYPES[group.rows.W], **shared,
    )  # fmt: skip


def run(plan: ThetaPlan) -> None:
    """The launches."""
    device, rule = plan.device, plan.options.normalize or "none"
    scalars = (plan.corrections, plan.partials, plan.slots)
    sums = {"rms": "rms", "spectral": "rms", "trust": "trust", "none": "norm"}[rule]
    tables = [(group, group.table, plan.hyperparameters(group)) for group in plan.groups]
    for group, rows, hyperparameters in tables:
        shared = group.product_constants()
        entries, count = group.right_tiles
        launch(
            right_kernel, count, rows, hyperparameters, entries, plan.corrections, plan.corrections, device=device,
            SOURCE="g" if plan.after else "mg", COUNT=True, CHECK=False, **shared,
        )  # fmt: skip
        launch_core(group.core, device)
        entries, count = group.left_tiles
        launch(
            left_kernel, count, rows, hyperparameters, entries, *scalars, device=device,
            SUMS=sums, AFTER=plan.after, SQUARED=False, **shared,
        )  # fmt: skip
    elementwise = {"device": device, "per_processor": 4, **ELEMENTWISE._asdict()}
    for group, rows, hyperparameters in tables:
        entries, count = group.diagonal_tiles
        launch(
            diagonal_kernel, count, rows, hyperparameters, entries, *scalars,
            SUMS=sums, AFTER=plan.after, **group.rows.gradient_constants(), **elementwise,
        )  # fmt: skip
    for group, rows, hyperparameters in tables:
        entries, count = group.unit_tiles
        launch(
            unit_kernel, count, rows, hyperparameters, entries, plan.partials, device=device, per_processor=4,
            AFTER=plan.after, DIAGONAL=bool(group.diagonal), **group.rows.constants(), **COPY._asdict(),
        )  # fmt: skip
    for factors in plan.polar_factors.values():
        factors.launch()
    for group, rows, hyperparameters in tables:
        entries, count = group.update_tiles
        launch(
            update_kernel, count, rows, hyperparameters, entries, *scalars, plan.options.kappa, plan.norms, plan.ok,
            RULE=rule, AFTER=plan.after, DIAGONAL=bool(group.diagonal), W=DTYPES[group.rows.W],
            **group.rows.constants(), **elementwise,
        )  # fmt: skip


def theta_step(
    blocks: Sequence[Block],
    gs: Sequence[Matrix],
    options: ThetaOptions,
) -> tuple[Tensor, Tensor]:
    """As the reference's; nothing is decided on the host, which only waits where it counts the steps.

    Blocks that the kernels do not cover take their steps by the reference's functions, with the same norms, trust
    region and decision.
    """
    if not any(kind(b) for b in blocks):
        return reference.theta_step(blocks, gs, options)
    plan = plan_of(blocks, gs, lambda: kinds_of(blocks), options)
    refresh_stale([b for b, k in zip(blocks, plan.kinds, strict=True) if k in FACTORED])
    plan.sum_reference_blocks()
    if plan.fuses:
        run_fused(plan)
    else:
        run(plan)
    plan.move_reference_blocks()
    norms, ok = plan.end()
    raised: list[Tensor] = []
    counted: list[Tensor] = []
    for block, k in zip(blocks, plan.kinds, strict=True):
        if k is None:
            counted.append(block.step)
            continue
        block.product_version = None  # m has moved on
        raised += [p.param for p, g in zip(block.parts, block.grads, strict=True) if g is not None]
        raised.append(block.momentum)
        if counts_on_device(block.step, block, options.capturable):
            raised.append(block.step)
        else:
            counted.append(block.step)
    advance(counted, ok)
    torch.autograd.graph.increment_version(raised)
    return norms, ok
