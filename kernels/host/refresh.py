"""P = RᵀR and S = LLᵀ of all blocks in one launch, and DiagKron's copies of L and R in another."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...algebra.maths import Applications
from ...model.block import Block
from ..device.factors import refresh_kernel
from .configurations import shape_class, stored_twice, tile
from .coverage import covered_kind, kind
from .diagkron import copy_factors
from .launch import capability, launch, processors
from .plans import Plan, plan_of
from .state import workspace_of
from .tables.factor_rows import FactorRows, factors_of
from .tables.uploads import schedule, tiles


def square_tile(
    precision: str, sizes: Sequence[int], device: torch.device, epilogue: bool = False, narrow: bool = False
) -> dict:
    """Square tiles, since each is also stored transposed; ``epilogue``, ``narrow``: it needs the registers, or some."""
    arch = capability(device)
    halves = [(k, k // 2) for k in sizes]
    found = "epilogue" if epilogue else shape_class(halves, precision, arch, processors(device))
    chosen = tile(found, precision, arch)
    chosen = stored_twice(chosen) if narrow else chosen
    side = min(chosen.BM, chosen.BN)
    return {**chosen._asdict(), "BM": side, "BN": side}


def share_products(block: Block) -> None:
    """Tell the structure that our P and S are those of its λ."""
    workspace = workspace_of(block)
    workspace.version = block.structure.version
    if workspace.products is None:
        workspace.products = {}
        for factor in factors_of(block):
            product = ("P" if factor.transposed else "S") + factor.name[1:]
            workspace.products[product] = factor.square[:, : factor.square.shape[0]]
    block.structure.adopt(dict(workspace.products))


def refresh_stale(blocks: Sequence[Block]) -> None:
    """P and S of those blocks, all FACTORED, whose λ was written to since; of DiagKron's, the copies of L and R."""
    copy_factors([b for b in blocks if covered_kind(b) == "diagkron"])
    blocks = [b for b in blocks if covered_kind(b) == "kron"]
    stale = [b for b in blocks if workspace_of(b).version != b.structure.version]
    groups: dict[tuple[str, torch.device], FactorRows] = {}
    for block in stale:
        rows = groups.setdefault((block.structure.precision, block.momentum.device), FactorRows())
        for factor in factors_of(block):
            rows.append(block.structure.fishleg_aux[factor.name], factor.square, factor.transposed)
    for (precision, device), rows in groups.items():
        sides = square_tile(precision, rows.sizes, device)
        squares = [(i, k, k, 0) for i, k in enumerate(rows.sizes)]
        entries, count = schedule(tiles(squares, sides["BM"], sides["BN"], half=True), device)
        launch(
            refresh_kernel, count, rows.upload(device), entries, device=device,
            ALIGN=rows.align, PRECISION=precision, **sides,
        )  # fmt: skip
    for block in stale:
        share_products(block)


class RefreshPlan(Plan):
    """Which blocks have P and S, or copies, that our kernels make."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__(blocks)
        kinds = [covered_kind(b) for b in blocks]
        self.ours = [i for i, b in enumerate(blocks) if kinds[i] == "kron" or kind(b) == "diagkron"]
        self.uncovered = [i for i, found in enumerate(kinds) if found is None]


def refresh(blocks: Sequence[Block], applications: Sequence[Applications] | None = None) -> None:
    """As the reference's; P and S of the blocks that the kernels cover are always formed."""
    if not blocks:
        return
    plan = plan_of(blocks, "refresh", (), lambda: RefreshPlan(blocks))
    if plan.needs_refresh():
        refresh_stale([blocks[i] for i in plan.ours])
    for i in plan.uncovered:
        blocks[i].structure.refresh(applications[i] if applications else None)
