"""Q u over all blocks: 2 launches for all of Kron, Kron(scale=True), SumKron and DiagKron, 2 more if there are any of
the last, 1 for all Diagonal blocks.

v is (m, n) with rows that begin at multiples of 16 elements. ``torch.ops.fishleg_fast.kron_qv`` is the same of tensors,
for torch.compile: P u S of a list of matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...algebra.low_rank import LowRank
from ...algebra.matrix import Matrix
from ...backends import reference
from ...model.block import Block
from ..device.diagonal import diagonal_product_kernel
from ..device.products import left_kernel, right_kernel
from .configurations import ELEMENTWISE, shape_class, tile
from .coverage import FACTORED, kinds_of
from .diagkron import append_core, core_products, launch_core
from .launch import capability, launch, processors
from .refresh import refresh_stale
from .state import workspace_of
from .tables.block_rows import BlockMatrix, BlockRows, Gradient, block_matrix, pieces, weight_columns
from .tables.strides import padded
from .tables.uploads import schedule, tiles, upload
from .tables.workspace import ProductBuffers


def qv(blocks: Sequence[Block], us: Sequence[Matrix]) -> list[Matrix]:
    """As the reference's, which computes it for low-rank u and for blocks that the kernels do not cover."""
    kinds = [None if isinstance(u, LowRank) else k for u, k in zip(us, kinds_of(blocks), strict=True)]
    refresh_stale([b for b, k in zip(blocks, kinds, strict=True) if k in FACTORED])
    found: list[Matrix] = [
        reference.qv([b], [u])[0] if k is None else u for b, u, k in zip(blocks, us, kinds, strict=True)
    ]
    groups: dict[tuple, list[int]] = {}
    matrices: dict[int, BlockMatrix] = {}
    for index, (block, u, k) in enumerate(zip(blocks, us, kinds, strict=True)):
        if k is not None:
            matrices[index] = block_matrix(block, u)
            precision = "" if k == "diagonal" else block.structure.precision
            groups.setdefault((k == "diagonal", matrices[index].dtype, precision), []).append(index)
    for (diagonal, dtype, precision), indices in groups.items():
        members, given = [blocks[i] for i in indices], [matrices[i] for i in indices]
        rows = BlockRows(G=dtype)
        vs = _diagonal(members, given, rows) if diagonal else _factored(members, given, rows, precision)
        for i, v in zip(indices, vs, strict=True):
            found[i] = v
    return found


def _factored(blocks: list[Block], us: list[BlockMatrix], rows: BlockRows, precision: str) -> list[Tensor]:
    """Q u of blocks of Kron's kinds, whose rows are appended to ``rows``."""
    device, outs, core = blocks[0].momentum.device, [], BlockRows()
    for block, u in zip(blocks, us, strict=True):
        m, n = block.shape
        if "B" in block.structure.fishleg_aux:
            append_core(core, block)
        out = torch.empty(m, padded(n), dtype=torch.float32, device=device)
        rows.append(
            (m, n), Gradient.of(u.parts, weight_columns(block), u.scale), buffers=workspace_of(block).buffers(out),
            A=block.structure.fishleg_aux.get("A"),
        )  # fmt: skip
        outs.append(out[:, :n])
    scaled = any("A" in b.structure.fishleg_aux for b in blocks)
    _launch_products(rows, core, scaled, precision, device)
    return outs


def _launch_products(rows: BlockRows, core: BlockRows, scaled: bool, precision: str, device: torch.device) -> None:
    """Into each row's OUT; ``core``: of the DiagKron blocks among them."""
    shapes, table, arch = rows.shapes, rows.upload(device), capability(device)
    found = shape_class([s[:2] for s in shapes], precision, arch, processors(device), rows.general or scaled)
    config = tile(found, precision, arch)
    shared = {"SCALED": scaled, "PRECISION": precision, **rows.constants(), **config._asdict()}
    none = upload((0.0,), torch.float32, device)  # stands for what is not read
    right = [(i, n, m, t) for i, (m, n, terms) in enumerate(shapes) for t in range(terms)]
    entries, count = schedule(tiles(right, config.BM, config.BN), device)
    launch(
        right_kernel, count, table, none, entries, none, none, device=device, SOURCE="g", COUNT=False, CHECK=False,
        **shared,
    )  # fmt: skip
    launch_core(core_products(core, precision, config, device), device)
    entries, count = schedule(tiles([(i, m, n, 0) for i, (m, n, _) in enumerate(shapes)], config.BM, config.BN), device)
    launch(
        left_kernel, count, table, none, entries, none, none, 0, device=device, SUMS="none", AFTER=False, SQUARED=False,
        **shared,
    )  # fmt: skip


@torch.library.custom_op("fishleg_fast::kron_qv", mutates_args=())
def kron_qv(us: list[Tensor], Ps: list[Tensor], Ss: list[Tensor], precision: str) -> list[Tensor]:
    """P u S of each u (m, n), for P (m, m) and S (n, n) symmetric.

    P and S are copied with padding, which blocks' own P and S have already. Returns new tensors (m, n), float32.
    """
    device = us[0].device
    rows, buffers = BlockRows(), []
    for u, P, S in zip(us, Ps, Ss, strict=True):
        m, n = u.shape
        if P.shape != (m, m) or S.shape != (n, n):
            raise ValueError(f"P and S should be ({m}, {m}) and ({n}, {n}) but are: {tuple(P.shape)}, {tuple(S.shape)}")
        XT = torch.empty(n, padded(m), dtype=torch.float32, device=device)
        out = torch.empty(m, padded(n), dtype=torch.float32, device=device)
        buffers.append(ProductBuffers(1, _with_padding(S), _with_padding(P), XT, out))
        rows.append((m, n), Gradient(n, u.to(torch.float32)), buffers=buffers[-1])
    _launch_products(rows, BlockRows(), False, precision, device)
    return [x.out[:, : u.shape[1]].contiguous() for x, u in zip(buffers, us, strict=True)]


@kron_qv.register_fake
def _(us: list[Tensor], Ps: list[Tensor], Ss: list[Tensor], precision: str) -> list[Tensor]:
    return [torch.empty(u.shape, dtype=torch.float32, device=u.device) for u in us]


def _with_padding(square: Tensor) -> Tensor:
    k = square.shape[0]
    out = torch.zeros(k, padded(k), dtype=torch.float32, device=square.device)
    out[:, :k] = square
    return out


def _diagonal(blocks: list[Block], us: list[BlockMatrix], rows: BlockRows) -> list[Tensor]:
    """Q u of Diagonal blocks, whose rows are appended to ``rows``."""
    device, outs = blocks[0].momentum.device, []
    for block, u in zip(blocks, us, strict=True):
        d = block.structure.fishleg_aux["d"]
        out = torch.empty_like(d)
        for piece in pieces(block):
            rows.append(
                piece.shape, Gradient.of(u.parts[piece.parts], piece.cols, u.scale), A=d[piece.entries],
                v=out[piece.entries], vector=piece.vector,
            )  # fmt: skip
        outs.append(out)
    shapes = [(i, m, n, 0) for i, (m, n, _) in enumerate(rows.shapes)]
    entries, count = schedule(tiles(shapes, ELEMENTWISE.ROWS, ELEMENTWISE.COLS), device)
    launch(
        diagonal_product_kernel, count, rows.upload(device), entries, device=device, per_processor=4,
        **ELEMENTWISE._asdict(), **rows.gradient_constants(),
    )  # fmt: skip
    return outs
