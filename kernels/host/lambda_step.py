"""The λ step over all blocks; its launches are in ``device/lambda_step.py``'s docstring."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...algebra.matrix import Matrix
from ...backends import reference
from ...backends.protocol import LambdaOptions
from ...backends.reference import lambda_update
from ...model.block import Block, advance
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
from .tables.uploads import Tiles, schedule, tiles, upload, upload_rows

_RIGHT, _LEFT, _DOTS = (k.value * KIND_STRIDE.value for k in (RIGHT_PRODUCT, LEFT_PRODUCT, DOT_PRODUCTS))


def _dot_tiles(group: Group) -> tuple[Tiles, ...]:
    found = [(k, m, n, _DOTS) for k, (m, n, _) in enumerate(group.rows.shapes)]
    return tiles(found, *BESIDE_PRODUCTS, numbered=True)


def _launch_products(step: LambdaStep) -> None:
    """w's products and all sums."""
    precondition, rescale = step.options.precondition, not step.options.learn_scale
    if rescale:  # w needs the sums of all groups
        for group in step.groups:
            _launch_sides(step, group, _dot_tiles(group), RESCALE=False, PRECONDITION=False)
    for group in step.groups:
        shapes, sides = list(enumerate(group.rows.shapes)), (group.config["BM"], group.config["BN"])
        right = tiles([(k, n, m, _RIGHT + t) for k, (m, n, terms) in shapes for t in range(terms)], *sides)
        left = tiles([(k, m, n, _LEFT + t) for k, (m, n, terms) in shapes for t in range(terms)], *sides)
        found = (right if precondition else right + left) + (() if rescale else _dot_tiles(group))
        _launch_sides(step, group, found, RESCALE=rescale, PRECONDITION=precondition)
        if precondition:
            _launch_preconditioned(step, group, group.rows.upload(step.device), right + left)


def _launch_sides(step: LambdaStep, group: Group, found: tuple[Tiles, ...], **constants: bool) -> None:
    """The tiles ``found`` of a group's products of w and sums."""
    entries, count = schedule(found, step.device)
    launch(
        products_kernel, count, group.rows.upload(step.device), entries, step.dots, step.dot_slots,
        step.options.damping, device=step.device, SOURCE="residual", PRECISION=group.precision,
        **constants, **BESIDE_PRODUCTS._asdict(), **group.rows.constants(), **group.config,
    )  # fmt: skip


def _launch_preconditioned(step: LambdaStep, group: Group, table: Tensor, products: tuple[Tiles, ...]) -> None:
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
        products_kernel, count, rows.upload(step.device), entries, step.dots, step.dot_slots, step.options.damping,
        device=step.device, RESCALE=False, PRECONDITION=False, SOURCE="x", PRECISION=group.precision,
        **BESIDE_PRODUCTS._asdict(), **rows.constants(), **group.config,
    )  # fmt: skip


def _launch_diagonal_sums(step: LambdaStep) -> list[Tensor]:
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
            step.dots, step.dot_slots, step.squares, step.options.damping, *step.log2_betas, device=step.device,
            per_processor=4, PRECONDITION=step.options.precondition,
            **ELEMENTWISE._asdict(), **rows.gradient_constants(),
        )  # fmt: skip
    return used


def _launch_factors(step: LambdaStep, lr: Tensor) -> None:
    """λ of Kron and SumKron, and their P and S."""
    device, (beta1, beta2), eps = step.device, step.options.betas, step.options.eps
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


def _launch_diagonal_adam(step: LambdaStep, used: list[Tensor], lr: Tensor) -> None:
    """d of Diagonal blocks."""
    options = step.options
    for corrections, group in zip(used, step.diagonals.values(), strict=True):
        rows = group.rows
        found = [(k, m, n, 0) for k, (m, n, _) in enumerate(rows.shapes)]
        entries, count = schedule(tiles(found, ELEMENTWISE.ROWS, ELEMENTWISE.COLS), step.device)
        launch(
            diagonal_adam_kernel, count, rows.upload(step.device), entries, corrections, step.dots, step.dot_slots,
            step.squares, step.square_slots, step.loss, step.ok, lr, *options.betas, options.eps, options.damping,
            device=step.device, per_processor=4, RESCALE=not options.learn_scale, PRECONDITION=options.precondition,
            **ELEMENTWISE._asdict(), **rows.gradient_constants(),
        )  # fmt: skip


def lambda_step(
    blocks: Sequence[Block],
    us: Sequence[Matrix],
    vs: Sequence[Matrix],
    fvs: Sequence[Matrix],
    options: LambdaOptions,
) -> tuple[Tensor, Tensor]:
    """As the reference's; nothing is decided on the host, which only waits where it counts the steps.

    Blocks that the kernels do not cover take their steps by the reference's functions, with the same 𝒜, α and decision.
    """
    kinds = [learned_kind(*each) for each in zip(blocks, kinds_of(blocks), us, vs, strict=True)]
    if not any(kinds):
        return reference.lambda_step(blocks, us, vs, fvs, options)
    refresh_stale([b for b, k in zip(blocks, kinds, strict=True) if k == "kron"])
    step, lr = LambdaStep(blocks, us, vs, fvs, kinds, options), options.lr
    on_device = (
        lr.to(step.device, torch.float32)
        if isinstance(lr, Tensor)
        else upload((float(lr),), torch.float32, step.device)
    )
    corrections = _launch_diagonal_sums(step)
    step.sum_reference_blocks()
    _launch_products(step)
    others = step.reference_gradients()
    _launch_factors(step, on_device)
    _launch_diagonal_adam(step, corrections, on_device)
    for index, grads in others.items():
        lambda_update.adam_step(blocks[index], grads, options, step.ok)
    both = list(zip(blocks, kinds, strict=True))
    advance([block.aux_step for block, k in both if k is None or not step.counts_on_device(block)], step.ok)
    for block, found in both:
        if found is None:
            continue
        state = [*block.exp_avg.values(), *block.exp_avg_sq.values()]
        torch.autograd.graph.increment_version([*block.structure.fishleg_aux.values(), *state])
        if found == "kron":
            share_products(block)
    return step.loss, step.ok
