"""Q u over all blocks: 2 launches for all of Kron, Kron(scale=True), SumKron and DiagKron, 2 more if there are any of
the last, 1 for all Diagonal blocks.

v is (m, n) with rows that begin at multiples of 16 elements. ``torch.ops.fishleg_fast.kron_qv`` is the same of tensors,
for torch.compile: P u S of a list of matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import Block
from ..reference import steps
from ..reference.thin import Matrix, Thin
from .configurations import ELEMENTWISE, shape_class, tile
from .diagkron import launch_between, middle, prepared
from .launch import capability, launch, processors
from .products import left_kernel, matrix, right_kernel, scale
from .rows import DTYPES, FACTORED, Rows, kinds_of, pieces
from .shared import F_A, F_LDA, F_LDV, F_M, F_N, F_V, FIELDS, address, field, gradient
from .symmetric import refresh_all
from .table import Memory, padded, schedule, tiles, upload, workspace


@triton.jit(do_not_specialize=["tiles"])
def diagonal_product_kernel(
    rows, schedule, tiles, G: tl.constexpr, GENERAL: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """d²∘u, into F_V. Schedule: (row, tile of rows, tile of columns, unused)."""
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry = schedule + t * 4
        row = rows + tl.load(entry) * FIELDS
        i, j = tl.load(entry + 1), tl.load(entry + 2)
        r, c = (i * ROWS + tl.arange(0, ROWS))[:, None], (j * COLS + tl.arange(0, COLS))[None, :]
        n = field(row, F_N)
        inside = r < field(row, F_M)
        d = matrix(row, F_A, F_LDA, r, c, inside, n, 1)
        u = scale(row) * gradient(row, r, c, inside, G, GENERAL, ALIGN)
        at = address(row, F_V, tl.float32, 1) + r * field(row, F_LDV) + c
        tl.store(at, d * d * u, mask=inside & (c < n))


def qv(blocks: Sequence[Block], us: Sequence[Matrix]) -> list[Matrix]:
    """As ``reference.qv``, which computes it for thin u and for blocks that the kernels do not cover."""
    kinds = [None if isinstance(u, Thin) else k for u, k in zip(us, kinds_of(blocks), strict=True)]
    refresh_all([b for b, k in zip(blocks, kinds, strict=True) if k in FACTORED])
    found: list[Matrix] = [steps.qv([b], [u])[0] if k is None else u for b, u, k in zip(blocks, us, kinds, strict=True)]
    groups: dict[tuple, list[int]] = {}
    for index, (block, u, k) in enumerate(zip(blocks, us, kinds, strict=True)):
        if k is not None:
            dtype = next((t.dtype for t in pieces(block, u)[0] if t is not None), torch.float32)
            key = ("diagonal", dtype, "") if k == "diagonal" else ("kron", dtype, block.structure.precision)
            groups.setdefault(key, []).append(index)
    for (k, dtype, precision), indices in groups.items():
        members, given = [blocks[i] for i in indices], [us[i] for i in indices]
        vs = _diagonal(members, given, dtype) if k == "diagonal" else _kron(members, given, dtype, precision)
        for i, v in zip(indices, vs, strict=True):
            found[i] = v
    return found


def _common(block: Block, u: Matrix, dtype: torch.dtype) -> dict:
    grads, factor = pieces(block, u)
    dtype = dtype if dtype in DTYPES else torch.float32
    factor = None if factor is None else factor.to(block.momentum.device, torch.float32)
    return {"grads": [None if t is None else t.to(dtype) for t in grads], "scale": factor, "params": (), "x": None}


def _kron(blocks: list[Block], us: list[Matrix], dtype: torch.dtype, precision: str) -> list[Tensor]:
    device = blocks[0].momentum.device
    rows, outs, alive = Rows(G=dtype if dtype in DTYPES else torch.float32), [], []
    middles = Rows()
    for block, u in zip(blocks, us, strict=True):
        m, n = block.shape
        if "B" in block.structure.fishleg_aux:
            middles.add_middle(middle(block), block.structure.fishleg_aux["B"])
        out = torch.empty(m, padded(n), dtype=torch.float32, device=device)
        A, common = block.structure.fishleg_aux.get("A"), _common(block, u, dtype)
        alive.append(common)
        rows.add(
            shape=(m, n), own=workspace(block), A=A, v=None, cols=n - (len(block.parts) > 1), out=out, **common
        )  # fmt: skip
        outs.append(out[:, :n])
    scaled = any("A" in b.structure.fishleg_aux for b in blocks)
    _products(rows, middles, scaled, precision, device)
    return outs


def _products(rows: Rows, middles: Rows, scaled: bool, precision: str, device: torch.device) -> None:
    """Into each row's F_OUT; ``middles``: of the DiagKron blocks among them."""
    shapes, table, arch = rows.shapes, rows.device(device), capability(device)
    found = shape_class([s[:2] for s in shapes], precision, arch, processors(device), rows.general or scaled)
    config = tile(found, precision, arch)
    shared = {"SCALED": scaled, "PRECISION": precision, **rows.constants(), **config._asdict()}
    none = upload((0.0,), torch.float32, device)  # stands for what is not read
    entries = tiles(
        [(i, n, m, t) for i, (m, n, terms) in enumerate(shapes) for t in range(terms)], config.BM, config.BN
    )
    entries, count = schedule(entries, device)
    launch(
        right_kernel, count, table, none, entries, none, none, device=device, SOURCE="g", COUNT=False, CHECK=False,
        **shared,
    )  # fmt: skip
    launch_between(prepared(middles, precision, config, device), device)
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
    rows, memory = Rows(), []
    for u, P, S in zip(us, Ps, Ss, strict=True):
        m, n = u.shape
        if P.shape != (m, m) or S.shape != (n, n):
            raise ValueError(f"P and S should be ({m}, {m}) and ({n}, {n}) but are: {tuple(P.shape)}, {tuple(S.shape)}")
        XT = torch.empty(n, padded(m), dtype=torch.float32, device=device)
        out = torch.empty(m, padded(n), dtype=torch.float32, device=device)
        memory.append(Memory(1, _with_padding(S), _with_padding(P), XT, out))
        u = u.to(torch.float32)
        rows.add(shape=(m, n), own=memory[-1], A=None, x=None, v=None, grads=[u], params=(), cols=n)
    _products(rows, Rows(), False, precision, device)
    return [x.out[:, : u.shape[1]].contiguous() for x, u in zip(memory, us, strict=True)]


@kron_qv.register_fake
def _(us: list[Tensor], Ps: list[Tensor], Ss: list[Tensor], precision: str) -> list[Tensor]:
    return [torch.empty(u.shape, dtype=torch.float32, device=u.device) for u in us]


def _with_padding(square: Tensor) -> Tensor:
    k = square.shape[0]
    out = torch.zeros(k, padded(k), dtype=torch.float32, device=square.device)
    out[:, :k] = square
    return out


def _diagonal(blocks: list[Block], us: list[Matrix], dtype: torch.dtype) -> list[Tensor]:
    device = blocks[0].momentum.device
    rows, outs, alive = Rows(G=dtype if dtype in DTYPES else torch.float32), [], []
    for block, u in zip(blocks, us, strict=True):
        d, common = block.structure.fishleg_aux["d"], _common(block, u, dtype)
        out = torch.empty_like(d)
        alive.append(common)
        grads = common.pop("grads")
        if block.axis == 1:
            rows.add(
                shape=block.shape, own=None, A=d, v=out, grads=grads, cols=block.shape[1] - (len(block.parts) > 1),
                **common,
            )  # fmt: skip
        else:
            start = 0
            for part, g in zip(block.parts, grads, strict=True):
                count = part.of(part.param).numel()
                piece = slice(start, start + count)
                rows.add(
                    shape=(1, count), own=None, A=d[piece], v=out[piece], grads=[g], cols=count, vector=True, **common
                )  # fmt: skip
                start += count
        outs.append(out)
    entries = tiles([(i, m, n, 0) for i, (m, n, _) in enumerate(rows.shapes)], *ELEMENTWISE[:2])
    entries, count = schedule(entries, device)
    constants = rows.constants()
    constants.pop("ALIGN_X")
    launch(
        diagonal_product_kernel, count, rows.device(device), entries, device=device, per_processor=4,
        ROWS=ELEMENTWISE[0], COLS=ELEMENTWISE[1], num_warps=ELEMENTWISE[2], **constants,
    )  # fmt: skip
    return outs
