"""The λ step over all blocks; its launches are in ``device/lambda_step.py``'s docstring."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fishleg_fast import reference
from fishleg_fast.blocks import Block
from fishleg_fast.reference import steps
from fishleg_fast.reference.thin import Matrix

from ..device.diagonal import diagonal_adam_kernel, diagonal_sums_kernel
from ..device.factors import pair_kernel
from ..device.lambda_step import (
    DOT_PRODUCTS,
    KIND_STRIDE,
    LEFT_PRODUCT,
    RIGHT_PRODUCT,
    commit_kernel,
    gradients_kernel,
    products_kernel,
)
from ..device.products import left_kernel
from .configurations import BESIDE_PRODUCTS, ELEMENTWISE
from .coverage import kinds_of
from .lambda_rows import Group, LambdaStep, learned_kind
from .launch import launch
from .refresh import refresh_stale, share_products, square_tile
from .tables.uploads import schedule, tiles, upload, upload_rows

_RIGHT, _LEFT, _DOTS = (k.value * KIND_STRIDE.value for k in (RIGHT_PRODUCT, LEFT_PRODUCT, DOT_PRODUCTS))


def _launch_products(step: LambdaStep, damping: float, rescale: bool) -> None:
    """w's products and all sums."""
    for group in step.groups:
        table, shapes = group.rows.upload(step.device), list(enumerate(group.rows.shapes))
        sides = group.config["BM"], group.config["BN"]
        right = tiles([(k, n, m, _RIGHT + t) for k, (m, n, terms) in shapes for t in range(terms)], *sides)
        left = tiles([(k, m, n, _LEFT + t) for k, (m, n, terms) in shapes for t in range(terms)], *sides)
        dots = tiles([(k, m, n, _DOTS) for k, (m, n, _) in shapes], *BESIDE_PRODUCTS, numbered=True)
        products = right if step.precondition else right + left
        todo = [(products + dots, False, step.precondition)]
        if rescale:  # w needs the sums
            todo = [(dots, False, False), (products, True, step.precondition)]
        for found, rescaled, precondition in todo:
            entries, count = schedule(found, step.device)
            launch(
                products_kernel, count, table, entries, step.dots, step.dot_slots, damping, device=step.device,
                RESCALE=rescaled, PRECONDITION=precondition, SOURCE="residual", PRECISION=group.precision,
                **BESIDE_PRODUCTS._asdict(), **group.rows.constants(), **group.config,
            )  # fmt: skip
        if step.precondition:
            _launch_preconditioned(step, group, table, right + left, damping)


def _launch_preconditioned(step: LambdaStep, group: Group, table: Tensor, products: tuple, damping: float) -> None:
    """Q w, from S wᵀ, and its products."""
    rows = group.preconditioned_rows
    whole = [(k, m, n, 0) for k, (m, n, _) in enumerate(group.rows.shapes)]
    entries, count = schedule(tiles(whole, group.config["BM"], group.config["BN"]), step.device)
    launch(
        left_kernel, count, table, step.dots, entries, step.dots, step.dots, 0, device=step.device, SUMS="none",
        AFTER=False, SCALED=False, SQUARED=False, PRECISION=group.precision, **group.rows.constants(), **group.config,
    )  # fmt: skip
    entries, count = schedule(products, step.device)
    launch(
        products_kernel, count, rows.upload(step.device), entries, step.dots, step.dot_slots, damping,
        device=step.device, RESCALE=False, PRECONDITION=False, SOURCE="x", PRECISION=group.precision,
        **BESIDE_PRODUCTS._asdict(), **rows.constants(), **group.config,
    )  # fmt: skip


def _launch_diagonal_sums(step: LambdaStep, damping: float) -> list[Tensor]:
    """The sums of Diagonal blocks. Returns Adam's bias corrections, which the next launch is to use."""
    used = []
    for group in step.diagonals.values():
        rows = group.rows
        found = [(k, *rows.shapes[k][:2], number) for k, number in group.numbers]
        entries, count = schedule(tiles(found, ELEMENTWISE.ROWS, ELEMENTWISE.COLS, numbered=True), step.device)
        corrections = upload_rows(group.corrections, torch.float32, step.device)
        used.append(torch.empty(len(rows), 2, dtype=torch.float32, device=step.device))
        launch(
            diagonal_sums_kernel, count, rows.upload(step.device), entries, corrections, used[-1],
            step.dots, step.dot_slots, step.squares, damping, *step.log2_betas, device=step.device, per_processor=4,
            PRECONDITION=step.precondition, **ELEMENTWISE._asdict(), **rows.gradient_constants(),
        )  # fmt: skip
    return used


def _launch_factors(step: LambdaStep, lr: Tensor, eps: float) -> None:
    """λ of Kron and SumKron, and their P and S."""
    device, (beta1, beta2) = step.device, step.betas
    for group in step.groups:
        table, sizes = group.factors.upload(device), group.factors.sizes
        shapes = [(k, size, size, 0) for k, size in enumerate(sizes)]
        square = square_tile(group.precision, sizes, device)
        entries, count = schedule(tiles(shapes, square["BM"], square["BN"], half=True), device)
        launch(pair_kernel, count, table, entries, device=device, PRECISION=group.precision, **square)
        square = square_tile(group.precision, sizes, device, epilogue=True)
        entries, count = schedule(tiles(shapes, square["BM"], square["BN"], numbered=True), device)
        corrections = upload_rows(group.corrections, torch.float32, device)
        launch(
            gradients_kernel, count, table, entries, corrections, step.squares, lr, beta1, beta2, eps,
            *step.log2_betas, device=device, ALIGN=group.factors.align, PRECISION=group.precision, **square,
        )  # fmt: skip
    for group in step.groups:  # once all gradients are known to be finite
        table, sizes = group.factors.upload(device), group.factors.sizes
        square = square_tile(group.precision, sizes, device)
        half = tiles([(k, size, size, 0) for k, size in enumerate(sizes)], square["BM"], square["BN"], half=True)
        whole = tiles([(k, size, size, 1) for k, size in enumerate(sizes)], *BESIDE_PRODUCTS)
        entries, count = schedule(half + whole, device)
        launch(
            commit_kernel, count, table, entries, step.dots, step.dot_slots, step.squares, step.square_slots, step.loss,
            step.ok, beta1, beta2, device=device, PRECISION=group.precision, **BESIDE_PRODUCTS._asdict(), **square,
        )  # fmt: skip


def _launch_diagonal_adam(
    step: LambdaStep, used: list[Tensor], lr: Tensor, eps: float, damping: float, rescale: bool
) -> None:
    """d of Diagonal blocks."""
    for corrections, group in zip(used, step.diagonals.values(), strict=True):
        rows = group.rows
        found = [(k, m, n, 0) for k, (m, n, _) in enumerate(rows.shapes)]
        entries, count = schedule(tiles(found, ELEMENTWISE.ROWS, ELEMENTWISE.COLS), step.device)
        launch(
            diagonal_adam_kernel, count, rows.upload(step.device), entries, corrections, step.dots, step.dot_slots,
            step.squares, step.square_slots, step.loss, step.ok, lr, *step.betas, eps, damping, device=step.device,
            per_processor=4, RESCALE=rescale, PRECONDITION=step.precondition,
            **ELEMENTWISE._asdict(), **rows.gradient_constants(),
        )  # fmt: skip


def lambda_step(
    blocks: Sequence[Block],
    us: Sequence[Matrix],
    vs: Sequence[Matrix],
    fvs: Sequence[Matrix],
    *,
    damping: float,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    precondition: bool = False,
    learn_scale: bool = True,
    capturable: bool = False,
) -> tuple[Tensor, Tensor]:
    """As ``reference.lambda_step``; nothing is decided on the host, which only waits where it counts the steps.

    Blocks that the kernels do not cover take their steps by the reference's functions, with the same 𝒜, α and decision.
    """
    kinds = [learned_kind(*each) for each in zip(blocks, kinds_of(blocks), us, vs, strict=True)]
    if not any(kinds):
        return reference.lambda_step(
            blocks, us, vs, fvs, damping=damping, lr=lr, betas=betas, eps=eps, precondition=precondition,
            learn_scale=learn_scale, capturable=capturable,
        )  # fmt: skip
    refresh_stale([b for b, k in zip(blocks, kinds, strict=True) if k == "kron"])
    step, rescale = LambdaStep(blocks, us, vs, fvs, kinds, betas, precondition, capturable), not learn_scale
    on_device = (
        lr.to(step.device, torch.float32)
        if isinstance(lr, Tensor)
        else upload((float(lr),), torch.float32, step.device)
    )
    corrections = _launch_diagonal_sums(step, damping)
    step.sum_reference_blocks(damping)
    _launch_products(step, damping, rescale)
    others = step.reference_gradients(damping, rescale)
    _launch_factors(step, on_device, eps)
    _launch_diagonal_adam(step, corrections, on_device, eps, damping, rescale)
    for index, grads in others.items():
        steps.adam_step(blocks[index], grads, lr, betas, eps, step.ok)
    for block, found in zip(blocks, kinds, strict=True):
        if found is None:
            continue
        if not step.counts_on_device(block):
            block.aux_step.add_(step.ok.to(block.aux_step.device))
        state = [*block.exp_avg.values(), *block.exp_avg_sq.values()]
        torch.autograd.graph.increment_version([*block.structure.fishleg_aux.values(), *state])
        if found == "kron":
            share_products(block)
    return step.loss, step.ok
