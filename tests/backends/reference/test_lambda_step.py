"""The λ step of every backend for CPUs against autograd through a dense Q(λ) and torch.optim.Adam."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from fishleg_fast.algebra.structures.diagkron import DiagKron
from fishleg_fast.algebra.structures.diagonal import Diagonal
from fishleg_fast.algebra.structures.kron import Kron
from fishleg_fast.algebra.structures.sumkron import SumKron
from fishleg_fast.backends import reference as steps  # or the ops of another backend, by each_backend
from fishleg_fast.backends.protocol import LambdaOptions
from fishleg_fast.model.block import Block
from support.blocks import assert_same, everything, fisher_products, gradients, make_block, make_blocks, split
from support.dense import dense_q, randn, relative

pytestmark = pytest.mark.usefixtures("each_backend", "no_grad")

EXACT = {False: 1e-11, True: 1e-6}  # by capturable: the count of steps is then a float32 tensor, and so are powers of β

STRUCTURES = {
    "kron": lambda m, n, **o: Kron(m, n, **o),
    "kron-scale": lambda m, n, **o: Kron(m, n, scale=True, **o),
    "diagkron": lambda m, n, **o: DiagKron(m, n, **o),
    "sumkron": lambda m, n, **o: SumKron(m, n, **o),
    "diagonal": lambda m, n, **o: Diagonal((m, n), **o),
    "blocks": lambda m, n, **o: Kron(m, n, max_factor_size=2, **o),
}


def leaves_of(blocks: list[Block]) -> list[dict[str, Tensor]]:
    """λ of each block, to differentiate by."""
    return [{name: t.clone().requires_grad_() for name, t in b.structure.fishleg_aux.items()} for b in blocks]


def q_of(blocks: list[Block], leaves: list[dict[str, Tensor]]) -> Tensor:
    """Q(λ) over all blocks together, dense."""
    return torch.block_diag(*[dense_q(b.structure, leaf) for b, leaf in zip(blocks, leaves, strict=True)])


def one_update() -> tuple[list[Block], Tensor, Tensor, list[dict[str, Tensor]], Tensor]:
    """Blocks, F, u, and λ with a dense Q(λ) to differentiate: what a single λ step is checked with."""
    blocks = make_blocks()
    F, leaves = fisher_products(blocks), leaves_of(blocks)
    with torch.enable_grad():
        Q = q_of(blocks, leaves)
    return blocks, F, randn(len(F), seed=20), leaves, Q


def auxiliary_loss(Q: Tensor, F: Tensor, u: Tensor, damping: float) -> Tensor:
    """𝒜 = ½ uᵀQ(F + γI)Qu − uᵀQu."""
    v = Q @ u
    return 0.5 * v @ (F @ v + damping * v) - u @ v


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("kind", STRUCTURES)
def test_lambda_step_is_adam_on_the_auxiliary_loss(kind: str, capturable: bool) -> None:
    """Against torch.optim.Adam and autograd through a dense Q(λ) over all blocks: the same λ after every step."""
    options = {"damping": 0.3, "lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6}
    blocks = [make_block(STRUCTURES[kind](3, 5, dtype=torch.float64), [randn(3, 5)]), *make_blocks()]
    leaves = leaves_of(blocks)
    adam = torch.optim.Adam([t for leaf in leaves for t in leaf.values()], lr=0.01, betas=(0.8, 0.95), eps=1e-6)
    F = fisher_products(blocks)
    for step in range(5):
        u = randn(len(F), seed=20 + step)
        u /= u.norm()
        with torch.enable_grad():
            Q = q_of(blocks, leaves)
            want = auxiliary_loss(Q, F, u, 0.3)
        adam.zero_grad()
        want.backward()
        adam.step()
        vs = steps.qv(blocks, split(u, blocks))
        fv = split(F @ torch.cat([v.reshape(-1) for v in vs]), blocks)
        loss, ok = steps.lambda_step(blocks, split(u, blocks), vs, fv, LambdaOptions(**options, capturable=capturable))
        assert ok and relative(loss, want.detach()) <= EXACT[capturable]
        for b, leaf in zip(blocks, leaves, strict=True):
            assert b.aux_step == step + 1
            for name, t in leaf.items():
                assert relative(b.structure.fishleg_aux[name], t.detach()) <= EXACT[capturable], (step, name)


def test_lambda_step_on_the_shape_alone() -> None:
    """Without learn_scale: α⁻¹ times the gradient of min over α of 𝒜(αQ) = −(uᵀQu)²/2uᵀQ(F+γI)Qu."""
    blocks, F, u, leaves, Q = one_update()
    with torch.enable_grad():
        v = Q @ u
        curvature = v @ (F @ v + 0.3 * v)
        (-0.5 * (u @ v) ** 2 / curvature).backward()
    v, alpha = v.detach(), (u @ v / curvature).item()
    options = {"damping": 0.3, "lr": 1.0, "eps": 1e9, "learn_scale": False}  # Adam is linear then
    vs = steps.qv(blocks, split(u, blocks))
    loss, _ = steps.lambda_step(blocks, split(u, blocks), vs, split(F @ v, blocks), LambdaOptions(**options))
    assert relative(loss, auxiliary_loss(Q.detach(), F, u, 0.3)) <= 1e-12  # that of Q as it is
    for b, leaf in zip(blocks, leaves, strict=True):
        for name, t in leaf.items():
            moved = (t.detach() - b.structure.fishleg_aux[name]) * 1e9
            assert relative(alpha * moved, t.grad) <= 1e-5, name


def test_preconditioned_lambda_step() -> None:
    """w is Q·((F + γI)v − u): one step against autograd of ⟨w, Q(λ)u⟩ with w held constant."""
    blocks, F, u, leaves, Q = one_update()
    v = (Q @ u).detach()
    w = Q.detach() @ (F @ v + 0.3 * v - u)
    with torch.enable_grad():
        (w @ Q @ u).backward()
    torch.optim.Adam([t for leaf in leaves for t in leaf.values()], lr=0.01).step()
    vs = steps.qv(blocks, split(u, blocks))
    steps.lambda_step(
        blocks, split(u, blocks), vs, split(F @ v, blocks), LambdaOptions(damping=0.3, lr=0.01, precondition=True)
    )
    for b, leaf in zip(blocks, leaves, strict=True):
        for name, t in leaf.items():
            assert relative(b.structure.fishleg_aux[name], t.detach()) <= 1e-12, name


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("where", ["u", "fv", "overflow", "zero"])
def test_lambda_step_refuses(where: str, capturable: bool) -> None:
    """What is not finite, or a zero direction, writes nothing."""
    blocks = make_blocks(torch.float32)
    us = gradients(blocks, 1)
    if where == "zero":
        us = [torch.zeros_like(u) for u in us]
    if where == "overflow":
        us = [u * 1e30 for u in us]
    if where == "u":
        us[0][0, 0] = math.nan
    vs = steps.qv(blocks, us)
    fvs = copy.deepcopy(vs)
    if where == "fv":
        fvs[2][0] = math.inf
    before = everything(blocks)
    loss, ok = steps.lambda_step(blocks, us, vs, fvs, LambdaOptions(damping=0.1, lr=0.1, capturable=capturable))
    assert not ok
    assert_same(before, blocks)
    if where == "zero":
        assert loss == 0
