"""Blocks, and what else the tests of the Triton kernels in Triton's interpreter share (triton_*.py, on CPU tensors).

Uninitialised memory, scratch and outputs hold NaN. Truth is the reference in float64, on the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fishleg_fast import DiagKron, Diagonal, Kron, SumKron
from fishleg_fast.backends import reference as steps
from fishleg_fast.kernels.host.diagkron import core_buffers
from fishleg_fast.kernels.host.state import workspace_of
from fishleg_fast.kernels.host.tables.strides import padded
from fishleg_fast.kernels.host.theta.polar import polar_buffers
from fishleg_fast.model.block import Block
from support.blocks import make_block
from support.dense import randn, relative

CLOSE = 2e-5  # relative RMS of float32 sums over a few hundred terms
NAN = float("nan")


def poison(blocks: list[Block]) -> None:
    """NaN wherever kernels have to write before they read."""
    for b in blocks:
        if b.flattened and b.dtype == torch.float32:
            for after in (False, True):
                for t in polar_buffers(b, backend_kind(b), after):
                    t.fill_(NAN)
        if backend_kind(b) not in ("kron", "diagkron"):
            continue
        own, (m, n) = workspace_of(b), b.shape
        k = padded
        own.scratch("U", m, k(n)), own.scratch("UT", n, k(m)), own.scratch("WS", own.terms, m, k(n))
        for name, t in b.structure.fishleg_aux.items():
            if name[0] in "RL":
                for x in ("sym", "new", "grad"):
                    own.scratch(f"{x} {name}", len(t), k(len(t)))
        for t in (own.XT, own.out, *(t for name, t in own.more.items() if name != "arrived")):
            t.fill_(NAN)
        if own.version is None:
            own.S.fill_(NAN), own.P.fill_(NAN)
            if backend_kind(b) == "diagkron":
                core_buffers(b).S.fill_(NAN), core_buffers(b).P.fill_(NAN)


def backend_kind(block: Block) -> str | None:
    from fishleg_fast.kernels.host.coverage import kind

    return kind(block)


Maker = Callable[..., list[Block]]


def kron_blocks(dtype: torch.dtype = torch.float64, scaled: bool = True, **group: object) -> list[Block]:
    """Shapes of every kind: one element, odd, with a bias or without, more than one tile each way; scaled; sums."""
    o, f = {"dtype": dtype}, {"dtype": dtype}
    blocks = [
        make_block(Kron(33, 18, **o), [randn(33, 17, **f), randn(33, seed=1, **f)], **group),
        make_block(Kron(1, 1, **o), [randn(1, 1, seed=2, **f)], seed=1, **group),
        make_block(SumKron(5, 20, **o), [randn(5, 19, seed=3, **f), randn(5, seed=4, **f)], seed=2, **group),
        make_block(Kron(16, 48, **o), [randn(16, 48, seed=5, **f)], seed=3, **group),
    ]
    if scaled:
        blocks.append(make_block(Kron(7, 9, scale=True, **o), [randn(7, 9, seed=6, **f)], seed=4, **group))
    return [tamed(b) for b in blocks]


def sized_blocks(dtype: torch.dtype = torch.float64, **group: object) -> list[Block]:
    """1, 63 and 257 on either side; of 257, nine tiles, the last of one row."""
    f = {"dtype": dtype}
    shapes = [(257, 63), (63, 1), (1, 63), (1, 1)]
    return [
        tamed(
            make_block(Kron(m, n, **f), [randn(m, n - 1, **f), randn(m, **f)] if n > 1 else [randn(m, 1, **f)], **group)
        )
        for m, n in shapes
    ] + [
        tamed(make_block(DiagKron(m, n, **f), [randn(m, n, **f)], seed=m, **group))
        for m, n in [(257, 63), (1, 257), (63, 1)]
    ]


def diagkron_blocks(dtype: torch.dtype = torch.float64, **group: object) -> list[Block]:
    """As ``kron_blocks``."""
    o, f = {"dtype": dtype}, {"dtype": dtype}
    blocks = [
        make_block(DiagKron(3, 4, **o), [randn(3, 4, **f)], seed=7, **group),
        make_block(DiagKron(18, 35, **o), [randn(18, 34, **f), randn(18, seed=1, **f)], seed=9, **group),
        make_block(DiagKron(1, 1, **o), [randn(1, 1, seed=2, **f)], seed=10, **group),
        make_block(DiagKron(1, 17, **o), [randn(1, 17, seed=3, **f)], seed=11, **group),
        make_block(DiagKron(17, 1, **o), [randn(17, 1, seed=4, **f)], seed=12, **group),
    ]
    return [tamed(b) for b in blocks]


def factored_blocks(dtype: torch.dtype = torch.float64, **group: object) -> list[Block]:
    return kron_blocks(dtype, **group) + diagkron_blocks(dtype, **group)[:2]


def all_blocks(dtype: torch.dtype = torch.float64, **group: object) -> list[Block]:
    """The same, and Diagonal blocks, and those that the reference's functions do."""
    o, f = {"dtype": dtype}, {"dtype": dtype}
    return kron_blocks(dtype, **group) + [
        tamed(make_block(Diagonal((70, 1), **o), [randn(63, **f), randn(7, **f)], 0, 5, **group)),
        tamed(make_block(Diagonal((3, 5), **o), [randn(3, 4, **f), randn(3, **f)], 1, 6, **group)),
        *diagkron_blocks(dtype, **group)[:2],
        tamed(make_block(Kron(6, 5, max_factor_size=2, **o), [randn(6, 5, **f)], seed=8, **group)),
    ]


def tamed(block: Block) -> Block:
    """λ that keeps Q of order one, and float32 numbers in it, so that float64 can have the same."""
    for name, t in block.structure.fishleg_aux.items():
        t.copy_((t / t.shape[-1] ** 0.5 if name[0] in "RL" else t).float())
    for part in block.parts:
        part.param.copy_(part.param.float())
    return block


def pair(make: Maker, **group: object) -> tuple[list[Block], list[Block]]:
    """The same blocks in float64, for the reference, and in float32, for the kernels, poisoned."""
    exact, ours = make(torch.float64, **group), make(torch.float32, **group)
    for a, b in zip(exact, ours, strict=True):
        for name, t in a.structure.fishleg_aux.items():
            b.structure.fishleg_aux[name].copy_(t)
    poison(ours)
    return exact, ours


def matrices(blocks: list[Block], seed: int) -> list[Tensor]:
    return [randn(*b.shape, seed=1000 * seed + i).float() for i, b in enumerate(blocks)]


def products(block: Block) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(P, S, A) of each term in float64, from λ."""
    aux = {k: t.double() for k, t in block.structure.fishleg_aux.items()}
    A = aux.get("A", torch.ones(block.shape, dtype=torch.float64))
    names = [k[1:] for k in aux if k[0] == "R"]
    return [(aux["R" + k].T @ aux["R" + k], aux["L" + k] @ aux["L" + k].T, A) for k in names]


def dense_qv(block: Block, u: Tensor) -> Tensor:
    if isinstance(block.structure, Diagonal):
        return block.structure.fishleg_aux["d"].double() ** 2 * u.double()
    if isinstance(block.structure, DiagKron):
        R, L, A, B = (block.structure.fishleg_aux[name].double() for name in "RLAB")
        return A * torch.linalg.multi_dot([R.T, B**2 * torch.linalg.multi_dot([R, A * u.double(), L]), L.T])
    return sum(A * (P @ (A * u.double()) @ S) for P, S, A in products(block))


def aux_inputs(exact: list[Block], step: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """u, v and F v of every block, float32 numbers."""
    us = matrices(exact, step)
    us = [u / sum(x.square().sum() for x in us).sqrt() for u in us]
    vs = [v.float() for v in steps.qv(exact, [u.double() for u in us])]
    return us, vs, [0.5 * v + 0.1 * randn(*v.shape, seed=step).float() for v in vs]


def assert_learned(exact: list[Block], ours: list[Block], before: list[dict[str, Tensor]]) -> None:
    """λ moved as the reference's, its moments are the same; then the reference gets ours, to go on from there."""
    for a, b, old in zip(exact, ours, before, strict=True):
        for name, t in b.structure.fishleg_aux.items():
            target, case = a.structure.fishleg_aux[name], (b.shape, name)
            assert relative(b.exp_avg[name], a.exp_avg[name]) <= CLOSE * 10, case
            assert relative(b.exp_avg_sq[name], a.exp_avg_sq[name]) <= CLOSE * 10, case
            moved = (target - old[name]).norm()
            assert (t - target).norm() <= 1e-3 * moved + 1e-7 * target.norm() < 0.1 * moved, case
            target.copy_(t), a.exp_avg[name].copy_(b.exp_avg[name]), a.exp_avg_sq[name].copy_(b.exp_avg_sq[name])
