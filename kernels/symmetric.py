"""P = RᵀR and S = LLᵀ of all blocks in one launch: a symmetric product, of which half the tiles are computed.

F Fᵀ (k, k) for F = L or Rᵀ: tiles (i, j) with j ≤ i, each stored twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..reference.products import Vectors
from .configurations import shape_class, tile
from .diagkron import copy_factors
from .factors import (
    FACTOR_FIELDS,
    K_DEPTH,
    K_LDRIGHT,
    K_LDSQUARE,
    K_LEFT,
    K_PADDED,
    K_RIGHT,
    K_SIZE,
    K_SQUARE,
    K_SYM,
    K_TRANSPOSED,
    Factors,
    factor_tile,
)
from .launch import capability, launch, processors
from .rows import kind, layout
from .shared import address, dot, field, leading
from .table import schedule, tiles, workspace

if TYPE_CHECKING:
    from ..blocks import Block


@triton.jit
def square_of_aux(
    row, rm, rn, TRANSPOSED: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of F Fᵀ, from λ."""
    k = leading(row, K_SIZE, ALIGN).to(tl.int32)
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, k, BK):
        kk = start + tl.arange(0, BK)
        a = factor_tile(row, rm[:, None], kk[None, :], k, TRANSPOSED, ALIGN)
        b = factor_tile(row, rn[:, None], kk[None, :], k, TRANSPOSED, ALIGN)
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def store_symmetric(start, ld, acc, rm, rn, i, j, size, limit, ok):
    """Write a tile and, off the diagonal, its transpose. ``limit``: ``size`` with the padding."""
    tl.store(start + rm[:, None] * ld + rn[None, :], acc, mask=(rm < size)[:, None] & (rn < limit)[None, :] & ok)
    if i != j:
        mask = (rn < size)[:, None] & (rm < limit)[None, :] & ok
        tl.store(start + rn[:, None] * ld + rm[None, :], tl.trans(acc), mask=mask)


@triton.jit(do_not_specialize=["tiles", "slots"])
def refresh_kernel(
    rows, schedule, tiles,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """S and P from λ. Schedule: (row, i, j ≤ i, unused)."""
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry = schedule + t * 4
        row = rows + tl.load(entry) * FACTOR_FIELDS
        i, j = tl.load(entry + 1), tl.load(entry + 2)
        rm, rn = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN)
        if field(row, K_TRANSPOSED) != 0:
            acc = square_of_aux(row, rm, rn, True, ALIGN, PRECISION, BM, BN, BK)
        else:
            acc = square_of_aux(row, rm, rn, False, ALIGN, PRECISION, BM, BN, BK)
        start, ld = address(row, K_SQUARE, tl.float32, 16), leading(row, K_LDSQUARE, 16)
        store_symmetric(start, ld, acc, rm, rn, i, j, field(row, K_SIZE), leading(row, K_PADDED, 16), i >= 0)


@triton.jit(do_not_specialize=["tiles", "slots"])
def pair_kernel(
    rows, schedule, tiles, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """M + Mᵀ with M = left rightᵀ, (k, depth) each. Schedule: (row, i, j ≤ i, unused)."""
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry = schedule + t * 4
        row = rows + tl.load(entry) * FACTOR_FIELDS
        i, j = tl.load(entry + 1), tl.load(entry + 2)
        rm, rn = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN)
        size, depth = field(row, K_SIZE), leading(row, K_DEPTH, 16)
        left, right = address(row, K_LEFT, tl.float32, 16), address(row, K_RIGHT, tl.float32, 16)
        ld = leading(row, K_LDRIGHT, 16)
        acc = tl.zeros([BM, BN], tl.float32)
        for start in range(0, depth.to(tl.int32), BK):
            kk = (start + tl.arange(0, BK))[None, :]
            inside = kk < depth
            in_m, in_n = (rm < size)[:, None] & inside, (rn < size)[:, None] & inside
            a = tl.load(left + rm[:, None] * depth + kk, mask=in_m, other=0)
            b = tl.load(right + rn[:, None] * ld + kk, mask=in_n, other=0)
            acc = dot(a, b, acc, PRECISION)
            a = tl.load(right + rm[:, None] * ld + kk, mask=in_m, other=0)
            b = tl.load(left + rn[:, None] * depth + kk, mask=in_n, other=0)
            acc = dot(a, b, acc, PRECISION)
        limit = leading(row, K_PADDED, 16)
        store_symmetric(address(row, K_SYM, tl.float32, 16), limit, acc, rm, rn, i, j, size, limit, i >= 0)


def square_tile(precision: str, sizes: Sequence[int], device: torch.device, epilogue: bool = False) -> dict:
    """Square tiles, since each is also stored transposed; ``epilogue``: it needs the registers."""
    arch = capability(device)
    halves = [(k, k // 2) for k in sizes]
    found = "epilogue" if epilogue else shape_class(halves, precision, arch, processors(device))
    chosen = tile(found, precision, arch)
    side = min(chosen.BM, chosen.BN)
    return {**chosen._asdict(), "BM": side, "BN": side}


def factor_rows(block: Block) -> list[tuple[str, torch.Tensor, bool]]:
    """(name in λ, where F Fᵀ goes, whether F is transposed) of each factor."""
    own, mp = workspace(block), -(-block.shape[0] // 16) * 16
    names = [n for n in block.structure.fishleg_aux if n[0] in "RL"]
    pairs = []
    for name in names:
        term = int(name[1:]) - 1 if name[1:] else 0
        square = own.S[term] if name[0] == "L" else own.P[:, term * mp : (term + 1) * mp]
        pairs.append((name, square, name[0] == "R"))
    return pairs


def adopt(block: Block) -> None:
    """Tell the structure that our P and S are those of its λ."""
    own = workspace(block)
    own.version = block.structure.version
    cache = {}
    for name, square, transposed in factor_rows(block):
        cache[("P" if transposed else "S") + name[1:]] = square[:, : square.shape[0]]
    block.structure.adopt(cache)


def refresh_all(blocks: Sequence[Block]) -> None:
    """P and S of those blocks, all FACTORED, whose λ was written to since; of DiagKron's, the copies of L and R."""
    copy_factors([b for b in blocks if layout(b) == "diagkron"])
    blocks = [b for b in blocks if layout(b) == "kron"]
    stale = [b for b in blocks if workspace(b).version != b.structure.version]
    groups: dict[tuple[str, torch.device], Factors] = {}
    for block in stale:
        rows = groups.setdefault((block.structure.precision, block.momentum.device), Factors())
        for name, square, transposed in factor_rows(block):
            rows.add(block.structure.fishleg_aux[name], square, transposed)
    for (precision, device), rows in groups.items():
        t = square_tile(precision, rows.sizes, device)
        entries = tiles([(i, k, k, 0) for i, k in enumerate(rows.sizes)], t["BM"], t["BN"], half=True)
        plan, count = schedule(entries, device)
        launch(
            refresh_kernel, count, rows.device(device), plan, device=device,
            ALIGN=rows.align, PRECISION=precision, **t,
        )  # fmt: skip
    for block in stale:
        adopt(block)


def refresh(blocks: Sequence[Block], vectors: Sequence[Vectors] | None = None) -> None:
    """As ``reference.refresh``; P and S of the blocks that the kernels cover are always formed."""
    refresh_all([b for b in blocks if layout(b) == "kron" or kind(b) == "diagkron"])
    for block, uses in zip(blocks, vectors or [None] * len(blocks), strict=True):
        if layout(block) is None:
            block.structure.refresh(uses)
