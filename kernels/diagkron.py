"""What DiagKron needs beside the products of the others: copies of its factors, and two products in between.

Q u = A∘(Rᵀ(B²∘(R(A∘u)L))Lᵀ) in the order of ``products.py``, each product reading rows of its factor:

    right   X = (A∘u) L        Lᵀ in the place of S
    left    Y = B²∘(R X)       R in the place of P
    right   Z = Y Lᵀ           L in the place of S
    left    A∘(Rᵀ Z)           Rᵀ in the place of P
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configurations import COPY, Tile
from .factors import FACTOR_FIELDS, K_LDSQUARE, K_PADDED, K_SIZE, K_SQUARE, K_TRANSPOSED, Factors, factor_tile
from .launch import launch
from .products import left_kernel, right_kernel
from .rows import Rows
from .shared import address, field, leading
from .table import Memory, padded, schedule, tiles, upload, workspace

if TYPE_CHECKING:
    from ..blocks import Block


@triton.jit(do_not_specialize=["tiles"])
def copy_kernel(rows, schedule, tiles, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """F from λ, where F Fᵀ would go, with zeros in the padding. Schedule: (row, i, j, unused)."""
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry = schedule + t * 4
        row = rows + tl.load(entry) * FACTOR_FIELDS
        i, j = tl.load(entry + 1), tl.load(entry + 2)
        r, c = (i * ROWS + tl.arange(0, ROWS))[:, None], (j * COLS + tl.arange(0, COLS))[None, :]
        size = leading(row, K_SIZE, ALIGN)
        at = address(row, K_SQUARE, tl.float32, 16) + r * leading(row, K_LDSQUARE, 16) + c
        written = (r < size) & (c < leading(row, K_PADDED, 16))
        if field(row, K_TRANSPOSED) != 0:
            tl.store(at, factor_tile(row, r, c, size, True, ALIGN), mask=written)
        else:
            tl.store(at, factor_tile(row, r, c, size, False, ALIGN), mask=written)


def middle(block: Block) -> Memory:
    """For the second and the third product: copies of L and R; X and Y are the workspace's."""
    own, (m, n) = workspace(block), block.shape
    return Memory(1, own.scratch("L", n, padded(n)), own.scratch("R", m, padded(m)), own.XT, own.out)


def copy_factors(blocks: Sequence[Block]) -> None:
    """L, R and their transposes of DiagKron blocks whose λ was written to since, with padding: one launch.

    ValueError where A or B is not row-major (``Factors.add``: L and R).
    """
    stale = [b for b in blocks if workspace(b).version != b.structure.version]
    groups: dict[torch.device, Factors] = {}
    for block in stale:
        rows = groups.setdefault(block.momentum.device, Factors())
        aux, outer, inner = block.structure.fishleg_aux, workspace(block), middle(block)
        for name in "AB":
            if aux[name].stride(1) != 1 and block.shape[1] > 1:
                given = aux[name].stride()
                raise ValueError(f"{name} should be row-major but has strides: {given}; assign with copy_()")
        for name, copies in (("L", (inner.S, outer.S[0])), ("R", (inner.P, outer.P))):
            for transposed, copy in enumerate(copies):
                rows.add(aux[name], copy, bool(transposed))
    for device, rows in groups.items():
        entries, count = schedule(tiles([(i, k, k, 0) for i, k in enumerate(rows.sizes)], *COPY[:2]), device)
        launch(
            copy_kernel, count, rows.device(device), entries, device=device, per_processor=4, ALIGN=rows.align,
            ROWS=COPY[0], COLS=COPY[1], num_warps=COPY[2],
        )  # fmt: skip
    for block in stale:
        workspace(block).version = block.structure.version


class Between(NamedTuple):
    """The second product and the third of some rows (of ``Rows.add_middle``), prepared."""

    table: Tensor
    left: tuple[Tensor, int]
    right: tuple[Tensor, int]
    constants: dict


def prepared(rows: Rows, precision: str, config: Tile, device: torch.device) -> Between | None:
    """None where there are no rows."""
    if not len(rows):
        return None
    left = tiles([(k, m, n, 0) for k, (m, n, _) in enumerate(rows.shapes)], config.BM, config.BN)
    right = tiles([(k, n, m, 0) for k, (m, n, _) in enumerate(rows.shapes)], config.BM, config.BN)
    constants = {"PRECISION": precision, **rows.constants(), **config._asdict()}
    return Between(rows.device(device), schedule(left, device), schedule(right, device), constants)


def launch_between(given: Between | None, device: torch.device) -> None:
    """Two launches; none for None."""
    if given is None:
        return
    none = upload((0.0,), torch.float32, device)  # stands for what is not read
    entries, count = given.left
    launch(
        left_kernel, count, given.table, none, entries, none, none, 0, device=device, SUMS="none", AFTER=False,
        SCALED=True, SQUARED=True, **given.constants,
    )  # fmt: skip
    entries, count = given.right
    launch(
        right_kernel, count, given.table, none, entries, none, none, device=device, SOURCE="x", SCALED=False,
        COUNT=False, CHECK=False, **given.constants,
    )  # fmt: skip
