"""Packed products of the cpp backend, of every kind of operands, against float64, in lists of blocks of all kinds."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fishleg_fast.algebra.low_rank import LowRank
from fishleg_fast.algebra.matrix import dense
from fishleg_fast.backends import cpu, reference
from fishleg_fast.backends.cpu import packed_products
from fishleg_fast.backends.protocol import LambdaOptions, ThetaOptions
from fishleg_fast.model.block import Block
from support.blocks import assert_same, everything, theta
from support.dense import randn, relative
from support.packed_blocks import (
    EACH,
    ERRORS,
    Exact,
    assert_close,
    assert_errors,
    curved,
    directions,
    exact_gradients,
    exact_q,
    mixed,
    placed,
    whole,
)

pytestmark = [EACH, pytest.mark.usefixtures("poisoned")]

RANKS = [1, 5, 32, 33, 100]
BAD = float("nan"), float("inf"), -float("inf")


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("low_rank", [True, False])
def test_products(operands: torch.dtype, low_rank: bool, rank: int) -> None:
    """... of low-rank matrices as low-rank ones, in the order of the blocks."""
    blocks = mixed(operands)
    us = directions(blocks, rank, seed=3, low_rank=low_rank)
    got, theirs = cpu.qv(blocks, us), reference.qv(blocks, us)
    assert [type(x) for x in got] == [type(x) for x in theirs]
    want = [exact_q(b, whole(u)) for b, u in zip(blocks, us, strict=True)]
    assert_close([*map(whole, got)], want, [*map(whole, theirs)], ERRORS[operands].product)
    errors = [relative(whole(x), y) for b, x, y in zip(blocks, got, want, strict=True) if packed_products.covers(b)]
    assert max(errors) > ERRORS[operands].least


LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    lambda t: t.T.contiguous().T,
    lambda t: torch.stack([t, t], -1)[..., 0],
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["by columns", "gaps"])
@pytest.mark.parametrize("low_rank", [True, False])
def test_matrices_in_any_layout(operands: torch.dtype, low_rank: bool, layout: Callable[[Tensor], Tensor]) -> None:
    """The same bits, of Q u and of λ, or what torch rounds otherwise: it multiplies low-rank float32 matrices."""
    twins = mixed(operands), mixed(operands)
    plain = directions(twins[0], 5, seed=3, low_rank=low_rank)
    odd = [LowRank(layout(u.E), layout(u.H)) if isinstance(u, LowRank) else layout(u) for u in plain]
    found = []
    for blocks, us in zip(twins, (plain, odd), strict=True):
        vs = cpu.qv(blocks, us)
        assert cpu.lambda_step(blocks, us, vs, us, LambdaOptions(damping=0.1, lr=0.01))[1]
        ours = [(b, v) for b, v in zip(blocks, vs, strict=True) if packed_products.covers(b)]
        found.append([t for b, v in ours for t in (whole(v), *b.structure.fishleg_aux.values())])
    exact = operands == torch.bfloat16 or not low_rank
    assert all(torch.equal(x, y) or (not exact and relative(x, y) <= 1e-5) for x, y in zip(*found, strict=True))


def test_a_gradient_that_is_one_row_for_all(operands: torch.dtype) -> None:
    """E and H without strides, as the gradient of a sum has them."""
    blocks = [b for b in mixed(operands) if packed_products.covers(b)]
    us = [
        LowRank(torch.ones(()).expand(4, b.shape[0]), 0.1 * randn(1, b.shape[1]).float().expand(4, -1)) for b in blocks
    ]
    for b, u, v in zip(blocks, us, cpu.qv(blocks, us), strict=True):
        assert relative(whole(v), exact_q(b, whole(u))) <= 2 * ERRORS[operands].product
    assert cpu.theta_step(blocks, placed(blocks, us), ThetaOptions())[1]
    assert all(torch.isfinite(theta(b)).all() for b in blocks)


OPTIONS = [*itertools.product(("before", "after"), (True, False), ("rms", "trust", None))]


@pytest.mark.parametrize(("momentum", "nesterov", "normalize"), OPTIONS)
def test_theta_steps(operands: torch.dtype, momentum: str, nesterov: bool, normalize: str | None) -> None:
    """Low-rank and dense gradients in turns, λ written to in between, and gradients that are not finite after that."""
    options = {"momentum": momentum, "nesterov": nesterov, "normalize": normalize, "kappa": 1e-2}
    group = {"weight_decay": 0.1, "beta": 0.8}
    blocks, twins = mixed(operands, **group), mixed(operands, **group)
    exact, start = Exact(blocks), [theta(b).double() for b in blocks]
    for step in range(7):
        if step in (2, 4):  # before a dense step, and between low-rank ones
            for b in [*blocks, *twins]:
                for t in b.structure.fishleg_aux.values():
                    t.mul_(1.2)
        gs = directions(blocks, RANKS[step % 5], seed=100 * step, low_rank=step % 3 != 2)
        if step in (1, 4, 5):
            before, which = everything(blocks), step % 3 * 2  # a packed block
            broken = [g.scaled(BAD[step % 3]) if isinstance(g, LowRank) else g * BAD[step % 3] for g in gs]
            broken = [*gs[:which], broken[which], *gs[which + 1 :]]
            assert not cpu.theta_step(blocks, placed(blocks, broken), ThetaOptions(**options))[1]
            assert_same(before, blocks)
        for ops, those in ((cpu, blocks), (reference, twins)):
            assert ops.theta_step(those, placed(those, gs), ThetaOptions(**options))[1]
        exact.step([*map(whole, gs)], **options)
        for b, g in zip(blocks, gs, strict=True):
            assert b.step == step + 1 and b.product_known == (isinstance(g, LowRank) and momentum == "before")
            assert not b.product_known or relative(b.product, exact_q(b, b.momentum)) <= 2 * ERRORS[operands].step
    moved = [[theta(b).double() - s for b, s in zip(those, start, strict=True)] for those in (blocks, twins)]
    assert_close(moved[0], [t - s for t, s in zip(exact.thetas, start, strict=True)], moved[1], ERRORS[operands].step)
    averages = [[b.momentum for b in those] for those in (blocks, twins)]
    assert_close(averages[0], exact.averages, averages[1], ERRORS[operands].step if momentum == "after" else 1e-6)


def test_a_missing_gradient_and_none_but_zeros(operands: torch.dtype) -> None:
    """A part without one stays where it is; what is left of m is not blown up where all of it is zero."""
    blocks = mixed(operands, weight_decay=0.1)
    exact = Exact(blocks)
    for step in range(3):
        gs = directions(blocks, 5, seed=100 * step, low_rank=step == 0)
        if step == 2:
            gs = [torch.zeros_like(dense(g)) for g in gs]
        biased = [b for b in placed(blocks, gs) and blocks if step == 1 and len(b.parts) == 2]
        for b in biased:
            b.grads[1] = None
            dense(gs[blocks.index(b)])[:, -1] = 0
        biases = [b.parts[1].param.detach().clone() for b in biased]
        assert cpu.theta_step(blocks, gs, ThetaOptions())[1]
        assert all(torch.equal(b.parts[1].param, bias) for b, bias in zip(biased, biases, strict=True))
        exact.step([*map(whole, gs)], "before", False, "rms")
        for b, t in zip(blocks, exact.thetas, strict=True):
            if b in biased:
                t[:, -1] = theta(b)[:, -1].double()
            assert relative(theta(b), t) <= ERRORS[operands].step / 10


KINDS = ["low-rank F v", "dense F v", "dense u"]
BETAS = {"betas": (0.9, 0.99)}


def lambda_step(ops, blocks: list[Block], us: list, fvs: list, **options) -> tuple[Tensor, list[Tensor]]:
    """𝒜, and the gradients that Adam averaged."""
    before = [t.clone() for b in blocks for t in b.exp_avg.values()]
    loss, ok = ops.lambda_step(blocks, us, ops.qv(blocks, us), fvs, LambdaOptions(**BETAS, **options))
    assert ok
    after = [t for b in blocks for t in b.exp_avg.values()]
    return loss, [(new - 0.9 * old) / 0.1 for new, old in zip(after, before, strict=True)]


@pytest.mark.parametrize("learn_scale", [True, False])
@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_lambda_steps(operands: torch.dtype, kind: str, precondition: bool, learn_scale: bool) -> None:
    """The second one with the λ, P and S that the first one left."""
    options = {"damping": 0.3, "precondition": precondition, "learn_scale": learn_scale}
    ours, theirs = mixed(operands), mixed(operands)
    for step, rank in enumerate((5, 100)):
        found = []
        for ops, blocks in ((cpu, ours), (reference, theirs)):
            us = directions(blocks, rank, seed=7 + step, low_rank=kind != "dense u")
            fvs = curved(blocks, kind)
            (exact_loss, scale), exact = exact_gradients(blocks, [*map(whole, us)], [*map(whole, fvs)], **options)
            loss, got = lambda_step(ops, blocks, us, fvs, lr=0.01, eps=1e-3, **options)
            assert abs(float(loss) - exact_loss) <= ERRORS[operands].product * scale
            found.append([float((g - e).norm()) / size for g, (e, size) in zip(got, exact, strict=True)])
        assert_errors(*found, [g.numel() for g in got], ERRORS[operands].gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_lambda_moves_as_adam_says(operands: torch.dtype, kind: str) -> None:
    blocks = [b for b in mixed(operands) if packed_products.covers(b)]
    us = directions(blocks, 33, seed=7, low_rank=kind != "dense u")
    old = [t.double() for b in blocks for t in b.structure.fishleg_aux.values()]
    _, grads = lambda_step(cpu, blocks, us, curved(blocks, kind), damping=0.3, lr=0.02, eps=1e-3)
    new = [t.double() for b in blocks for t in b.structure.fishleg_aux.values()]
    for a, b, g in zip(old, new, grads, strict=True):
        g = g.double()
        assert relative(b - a, -0.02 * g / (g.abs() + 1e-3)) <= 1e-4
    assert all(b.aux_step == 1 for b in blocks)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fisher_product_that_is_not_finite_writes_nothing(operands: torch.dtype, kind: str, bad: float) -> None:
    blocks = mixed(operands)
    us = directions(blocks, 5, seed=7, low_rank=kind != "dense u")
    vs, good = cpu.qv(blocks, us), curved(blocks, kind)
    for which in (0, 6, 10):  # packed blocks
        fvs = curved(blocks, kind)
        broken = fvs[which]
        (broken.E if isinstance(broken, LowRank) else broken)[-1, -1] = bad
        before = everything(blocks)
        assert not cpu.lambda_step(blocks, us, vs, fvs, LambdaOptions(damping=0.1, lr=0.1))[1]
        assert_same(before, blocks)
    assert cpu.lambda_step(blocks, us, vs, good, LambdaOptions(damping=0.1, lr=0.1))[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_direction_of_zeros_writes_nothing(operands: torch.dtype, kind: str) -> None:
    blocks = mixed(operands)
    us = [
        u.scaled(0) if isinstance(u, LowRank) else 0 * u
        for u in directions(blocks, 5, seed=7, low_rank=kind != "dense u")
    ]
    before = everything(blocks)
    loss, ok = cpu.lambda_step(blocks, us, cpu.qv(blocks, us), us, LambdaOptions(damping=0.1, lr=0.1))
    assert not ok and loss == 0
    assert_same(before, blocks)
