"""The launches of a λ step, in order, prepared from its plan."""

from __future__ import annotations

import torch
from torch import Tensor

from ....backends.protocol import LambdaOptions
from ...device.commit import commit_kernel
from ...device.diagonal import diagonal_adam_kernel, diagonal_sums_kernel
from ...device.factors import pair_kernel
from ...device.lambda_step import (
    DOT_PRODUCTS,
    KIND_STRIDE,
    LEFT_PRODUCT,
    RIGHT_PRODUCT,
    gradients_kernel,
    products_kernel,
)
from ...device.products import left_kernel
from ..configurations import BESIDE_PRODUCTS, ELEMENTWISE
from ..launch import Launch
from ..refresh import square_tile
from ..tables.uploads import Tiles, schedule, tiles
from .plan import Group, LambdaPlan, log2_betas

_RIGHT, _LEFT, _DOTS = (k.value * KIND_STRIDE.value for k in (RIGHT_PRODUCT, LEFT_PRODUCT, DOT_PRODUCTS))


def _dot_tiles(group: Group) -> tuple[Tiles, ...]:
    found = [(k, m, n, _DOTS) for k, (m, n, _) in enumerate(group.rows.shapes)]
    return tiles(found, *BESIDE_PRODUCTS, numbered=True)


class LambdaLaunches:
    """sums: of Diagonal blocks; products: of the others, and theirs; factors: ∂λ; commits: λ, and take (loss, ok)."""

    def __init__(self, plan: LambdaPlan, options: LambdaOptions) -> None:
        self._plan, self._options, self._key = plan, options, _key(options)
        self._device = plan.device
        self._lr = plan.tensor_lr if isinstance(options.lr, Tensor) else plan.told_lr
        self._known = (plan.dot_sums, plan.dot_sums.shape[1])
        self._tables = [(g, plan.table(g.rows)) for g in plan.groups]
        self.sums, adam = self._diagonal()
        self.products = self._products()
        self.factors, self.commits = self._factors()
        self.commits += adam
        for found in (self.sums, self.products, self.factors, self.commits):
            found[:] = [launch for launch in found if launch.tiles]

    def are_of(self, options: LambdaOptions) -> bool:
        """Whether they would be the same with those."""
        return self._key == _key(options)

    def _products(self) -> list[Launch]:
        """w's products and all sums."""
        precondition, rescale = self._options.precondition, not self._options.learn_scale
        found: list[Launch] = []
        if rescale:  # w needs the sums of all groups
            for group, table in self._tables:
                found.append(self._sides(group, table, _dot_tiles(group), RESCALE=False, PRECONDITION=False))
        for group, table in self._tables:
            shapes, sides = list(enumerate(group.rows.shapes)), (group.config["BM"], group.config["BN"])
            right = tiles([(k, n, m, _RIGHT + t) for k, (m, n, terms) in shapes for t in range(terms)], *sides)
            left = tiles([(k, m, n, _LEFT + t) for k, (m, n, terms) in shapes for t in range(terms)], *sides)
            work = (right if precondition else right + left) + (() if rescale else _dot_tiles(group))
            found.append(self._sides(group, table, work, RESCALE=rescale, PRECONDITION=precondition))
            if precondition:
                found += self._preconditioned(group, table, right + left)
        return found

    def _sides(self, group: Group, table: Tensor, work: tuple[Tiles, ...], **constants: bool | str) -> Launch:
        """The tiles of a group's products of w and sums."""
        entries, count = schedule(work, self._device)
        rows = group.rows if constants.get("SOURCE") is None else group.preconditioned_rows
        shared = {"SOURCE": "residual", "PRECISION": group.precision, "device": self._device, **rows.constants()}
        shared["ALIGN_V"] = rows.align_v
        plan = self._plan
        args: tuple = (table, entries, plan.dots, plan.dot_slots, *self._known, plan.arrived, self._options.damping)
        constants = {**shared, **group.config, **BESIDE_PRODUCTS._asdict(), **constants}
        return Launch(products_kernel, count, args, constants)

    def _preconditioned(self, group: Group, table: Tensor, products: tuple[Tiles, ...]) -> list[Launch]:
        """Q w, from S wᵀ, and its products."""
        device = self._device
        whole = [(k, m, n, 0) for k, (m, n, _) in enumerate(group.rows.shapes)]
        entries, count = schedule(tiles(whole, group.config["BM"], group.config["BN"]), device)
        none = self._plan.dots
        constants = {"SUMS": "none", "AFTER": False, "SCALED": False, "SQUARED": False, "PRECISION": group.precision}
        constants |= {"device": device, **group.rows.constants(), **group.config}
        again = self._plan.table(group.preconditioned_rows)
        return [
            Launch(left_kernel, count, (table, entries, none, none, 0, none, 0, none), constants),
            self._sides(group, again, products, RESCALE=False, PRECONDITION=False, SOURCE="x"),
        ]

    def _factors(self) -> tuple[list[Launch], list[Launch]]:
        """λ of Kron and SumKron, and their P and S."""
        plan, device, (beta1, beta2), eps = self._plan, self._device, self._options.betas, self._options.eps
        found: list[Launch] = []
        commits: list[Launch] = []
        for group in plan.groups:
            table, sizes = group.factors.upload(device), group.factors.sizes
            shapes = [(k, size, size, 0) for k, size in enumerate(sizes)]
            shared = {"device": device, "PRECISION": group.precision}
            square = square_tile(group.precision, sizes, device)
            half = tiles(shapes, square["BM"], square["BN"], half=True)
            entries, count = schedule(half, device)
            found.append(Launch(pair_kernel, count, (table, entries), {**shared, **square}))
            whole = tiles([(k, size, size, 1) for k, size in enumerate(sizes)], *BESIDE_PRODUCTS)
            entries, count = schedule(half + whole, device)
            args: tuple = (table, entries, *self._known, plan.square_sums, plan.square_sums.shape[0], beta1, beta2)
            commits.append(Launch(commit_kernel, count, args, {**shared, **square, **BESIDE_PRODUCTS._asdict()}))
            square = square_tile(group.precision, sizes, device, epilogue=True)
            entries, count = schedule(tiles(shapes, square["BM"], square["BN"], numbered=True), device)
            sums = (plan.squares, plan.square_sums, plan.arrived)
            args = (table, entries, plan.corrections(group), *sums, self._lr, beta1, beta2, eps)
            args += log2_betas(self._options)
            found.append(Launch(gradients_kernel, count, args, {**shared, **square, "ALIGN": group.factors.align}))
        return found, commits

    def _diagonal(self) -> tuple[list[Launch], list[Launch]]:
        """The sums of Diagonal blocks, and d."""
        plan, options, device = self._plan, self._options, self._device
        sums: list[Launch] = []
        adam: list[Launch] = []
        for group in plan.diagonals.values():
            rows, table = group.rows, plan.table(group.rows)
            used = torch.empty(len(rows), 2, dtype=torch.float32, device=device)  # which the next launch is to use
            shared = {"device": device, "per_processor": 4, "PRECONDITION": options.precondition}
            shared |= {**ELEMENTWISE._asdict(), **rows.gradient_constants()}
            numbered = [(k, *rows.shapes[k][:2], number) for k, number in group.numbers]
            entries, count = schedule(tiles(numbered, ELEMENTWISE.ROWS, ELEMENTWISE.COLS, numbered=True), device)
            args: tuple = (table, entries, plan.corrections(group), used, plan.dots, plan.dot_slots, plan.squares)
            args += (*self._known, plan.square_sums, plan.arrived, options.damping, *log2_betas(options))
            sums.append(Launch(diagonal_sums_kernel, count, args, shared))
            found = [(k, m, n, 0) for k, (m, n, _) in enumerate(rows.shapes)]
            entries, count = schedule(tiles(found, ELEMENTWISE.ROWS, ELEMENTWISE.COLS), device)
            args = (table, entries, used, *self._known, plan.square_sums, plan.square_sums.shape[0], self._lr)
            args += (*options.betas, options.eps, options.damping)
            adam.append(Launch(diagonal_adam_kernel, count, args, {**shared, "RESCALE": not options.learn_scale}))
        return sums, adam


def _key(options: LambdaOptions) -> tuple:
    """What launches have of the options, but for what the plan tells."""
    return options.damping, options.betas, options.eps, isinstance(options.lr, Tensor)
