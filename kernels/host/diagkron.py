"""What DiagKron needs beside the products of the others: copies of its factors, and its core, two products more.

Q u = A∘(Rᵀ(B²∘(R(A∘u)L))Lᵀ) in the order of ``device/products.py``, each product reading rows of its factor:

    right   X = (A∘u) L        Lᵀ in the place of S
    left    Y = B²∘(R X)       R in the place of P       | the core
    right   Z = Y Lᵀ           L in the place of S       |
    left    A∘(Rᵀ Z)           Rᵀ in the place of P
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...model.block import Block
from ..device.factors import copy_kernel
from ..device.products import left_kernel, right_kernel
from .configurations import COPY, Tile
from .launch import Launch, launch
from .state import workspace_of
from .tables.block_rows import BlockRows, Gradient
from .tables.factor_rows import FactorRows
from .tables.step_table import Sources, StepTable
from .tables.strides import padded
from .tables.uploads import schedule, tiles, upload
from .tables.workspace import ProductBuffers


def core_buffers(block: Block) -> ProductBuffers:
    """For the core's products: copies of L and R; X and Y are the workspace's."""
    workspace, (m, n) = workspace_of(block), block.shape
    L, R = workspace.scratch("L", n, padded(n)), workspace.scratch("R", m, padded(m))
    return ProductBuffers(1, L, R, workspace.XT, workspace.out)


def append_core(rows: BlockRows, block: Block, sources: Sources) -> None:
    """A block's row in its core: B²∘(P X), then that times S."""
    buffers, n = core_buffers(block), block.shape[1]
    B = block.structure.fishleg_aux["B"]
    out = sources.fixed(buffers.out[:, :n])
    rows.append(block.shape, Gradient(cols=n), buffers=buffers, A=B, x=out, out=out)


def copy_factors(blocks: Sequence[Block]) -> None:
    """L, R and their transposes of DiagKron blocks whose λ was written to since, with padding: one launch.

    ValueError where A or B is not row-major (``FactorRows.append``: L and R).
    """
    stale = [b for b in blocks if workspace_of(b).version != b.structure.version]
    groups: dict[torch.device, FactorRows] = {}
    for block in stale:
        rows = groups.setdefault(block.momentum.device, FactorRows())
        aux, workspace, core = block.structure.fishleg_aux, workspace_of(block), core_buffers(block)
        for name in "AB":
            if aux[name].stride(1) != 1 and block.shape[1] > 1:
                given = aux[name].stride()
                raise ValueError(f"{name} should be row-major but has strides: {given}; assign with copy_()")
        for name, copies in (("L", (core.S, workspace.S[0])), ("R", (core.P, workspace.P))):
            for transposed, copy in enumerate(copies):
                rows.append(aux[name], copy, bool(transposed))
    for device, rows in groups.items():
        squares = [(i, k, k, 0) for i, k in enumerate(rows.sizes)]
        entries, count = schedule(tiles(squares, COPY.ROWS, COPY.COLS), device)
        launch(
            copy_kernel, count, rows.upload(device), entries, device=device, per_processor=4, ALIGN=rows.align,
            **COPY._asdict(),
        )  # fmt: skip
    for block in stale:
        workspace_of(block).version = block.structure.version


def core_launches(rows: BlockRows, told: StepTable, precision: str, config: Tile, device: torch.device) -> list[Launch]:
    """Two, of rows of ``append_core``; none where there are none. ``told``: as in ``BlockRows.upload``."""
    if not len(rows):
        return []
    left, left_count = schedule(
        tiles([(k, m, n, 0) for k, (m, n, _) in enumerate(rows.shapes)], config.BM, config.BN), device
    )
    right, right_count = schedule(
        tiles([(k, n, m, 0) for k, (m, n, _) in enumerate(rows.shapes)], config.BM, config.BN), device
    )
    shared = {"device": device, "PRECISION": precision, **rows.constants(), **config._asdict()}
    none, table = upload((0.0,), torch.float32, device), rows.upload(device, told)  # none stands for what is not read
    squared = {"SUMS": "none", "AFTER": False, "SCALED": True, "SQUARED": True}
    plain = {"SOURCE": "x", "SCALED": False, "COUNT": False, "CHECK": False}
    return [
        Launch(left_kernel, left_count, (table, left, none, none, 0, none, 0, none), {**squared, **shared}),
        Launch(right_kernel, right_count, (table, right, none, none), {**plain, **shared}),
    ]
