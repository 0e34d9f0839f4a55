"""θ and λ steps on low-rank gradients, by every backend for CPUs, are those on the dense ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fishleg_fast import DiagKron, Kron, SumKron
from fishleg_fast.algebra.low_rank import LowRank
from fishleg_fast.backends import reference as steps  # or the ops of another backend, by each_backend
from fishleg_fast.backends.protocol import LambdaOptions, ThetaOptions
from support.blocks import assert_same, everything, fisher_products, make_block, split, theta
from support.dense import dense_q, flat, randn, relative
from support.low_rank import FORMED, low_rank_matrix

EXACT = 1e-10


def step_blocks(**group: object) -> list:
    """A layer with a bias, sums of two terms, factors in blocks, and a structure without a low-rank form."""
    w = {"dtype": torch.float64}
    return [
        make_block(Kron(9, 7, **w), [randn(9, 6), randn(9, seed=1)], **group),
        make_block(SumKron(8, 8, **w), [randn(8, 8, seed=2)], seed=1, **group),
        make_block(Kron(10, 6, max_factor_size=4, diagonal=("L",), **w), [randn(10, 6, seed=3)], seed=2, **group),
        make_block(DiagKron(3, 4, **w), [randn(3, 4, seed=4)], seed=3, **group),
    ]


def step_gradients(blocks: list, step: int) -> list[LowRank | Tensor]:
    """Low-rank ones, but for the last block, and for another one at every third step."""
    gs = [low_rank_matrix(1 + step % 3, b.shape, seed=100 * step + 10 * i) for i, b in enumerate(blocks)]
    return [g if i < 3 and (step % 3 or i != step // 3 % 3) else g.dense for i, g in enumerate(gs)]


def take(blocks: list, gs: list[LowRank | Tensor], low_rank: bool, **options: object) -> tuple[Tensor, Tensor]:
    for b, g in zip(blocks, gs, strict=True):
        b.grads = b.split(g.dense if isinstance(g, LowRank) else g)
    dense = [g.dense if isinstance(g, LowRank) else g for g in gs]
    with torch.no_grad():
        return steps.theta_step(blocks, gs if low_rank else dense, ThetaOptions(**options))


GRID = [(0.9, *rest) for rest in itertools.product(("before", "after"), (False, True), ("rms", "trust", None))]
GRID += [(0.0, *rest, "rms") for rest in itertools.product(("before", "after"), (False, True))]


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize(("beta", "momentum", "nesterov", "normalize"), GRID)
def test_theta_steps_are_those_of_dense_gradients(beta: float, momentum: str, nesterov: bool, normalize) -> None:
    """With steps in between that are dense or not finite, λ written to now and then, P and S formed or not."""
    options = {"momentum": momentum, "nesterov": nesterov, "normalize": normalize, "kappa": 1e-2}
    group = {"weight_decay": 0.1, "lr": 0.02, "beta": beta}
    low_rank, dense = step_blocks(**group), step_blocks(**group)
    for step in range(27):
        if step in (4, 5, 13):
            for b in [*low_rank, *dense]:
                b.structure.fishleg_aux[list(b.structure.fishleg_aux)[step % 2]].mul_(1.1)
        if step % 4 == 0:
            steps.refresh(low_rank, [list(FORMED.values())[step // 4 % 4]] * 4)
        gs = step_gradients(low_rank, step)
        if step in (7, 20):
            before, broken = everything(low_rank), [LowRank(g.E / 0, g.H) if isinstance(g, LowRank) else g for g in gs]
            _, ok = take(low_rank, broken[: step % 3 + 1] + gs[step % 3 + 1 :], True, **options)
            assert not ok
            assert_same(before, low_rank)
            for b in low_rank:  # what is known of Q m is still so
                assert not b.product_known or relative(b.product, b.structure.product(b.momentum)) <= EXACT
        (norms, ok), (want, _) = take(low_rank, gs, True, **options), take(dense, gs, False, **options)
        assert ok and relative(norms, want) <= EXACT
        for b, twin, g in zip(low_rank, dense, gs, strict=True):
            assert relative(theta(b), theta(twin)) <= EXACT and relative(b.momentum, twin.momentum) <= EXACT
            assert b.step == twin.step == step + 1
            assert b.product_known == (isinstance(g, LowRank) and momentum == "before")
            if b.product_known:
                Q = dense_q(b.structure, b.structure.fishleg_aux)
                assert relative(b.product.reshape(-1), Q @ b.momentum.reshape(-1)) <= EXACT


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.parametrize("learn_scale", [False, True])
def test_lambda_steps_are_those_of_dense_gradients(learn_scale: bool, precondition: bool) -> None:
    options = {"damping": 0.3, "lr": 0.01, "eps": 1e-4, "learn_scale": learn_scale, "precondition": precondition}
    low_rank, dense = step_blocks(), step_blocks()
    F = fisher_products(low_rank)
    with torch.no_grad():
        for step in range(6):
            us = [u.scaled(0.02) if isinstance(u, LowRank) else 0.02 * u for u in step_gradients(low_rank, step)]
            steps.refresh(low_rank, [list(FORMED.values())[step % 4]] * 4)
            found = []
            for blocks, directions in ((low_rank, us), (dense, [u.dense if isinstance(u, LowRank) else u for u in us])):
                vs = steps.qv(blocks, directions)
                fvs = split(F @ flat([v.dense if isinstance(v, LowRank) else v for v in vs]), blocks)
                found.append(steps.lambda_step(blocks, directions, vs, fvs, LambdaOptions(**options))[0])
            assert relative(*found) <= EXACT
            for b, twin in zip(low_rank, dense, strict=True):
                for name, t in twin.structure.fishleg_aux.items():
                    assert relative(b.structure.fishleg_aux[name], t) <= EXACT, (step, name)
                assert b.aux_step == step + 1
