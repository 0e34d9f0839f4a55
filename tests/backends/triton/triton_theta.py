"""The θ step by the Triton kernels, interpreted: test_triton.py runs this file with TRITON_INTERPRET=1."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import nn

from fishleg_fast import DiagKron, Diagonal, Kron
from fishleg_fast.backends import reference as steps
from fishleg_fast.backends.protocol import LambdaOptions, ThetaOptions
from fishleg_fast.kernels import backend
from fishleg_fast.kernels.host import configurations
from fishleg_fast.kernels.host.tables.strides import padded
from fishleg_fast.model.block import BackendState, Part
from fishleg_fast.model.gradients import GradientInPlace
from support.blocks import assert_same, everything, make_block, theta
from support.dense import randn, relative
from support.triton_blocks import (
    CLOSE,
    Maker,
    all_blocks,
    backend_kind,
    dense_qv,
    diagkron_blocks,
    factored_blocks,
    kron_blocks,
    matrices,
    pair,
    poison,
    tamed,
)

pytestmark = pytest.mark.usefixtures("interpreter_of_numpy_2_4", "poisoned")

THETA_LAUNCHES = {"rms": 3, "trust": 3, None: 2}


@pytest.mark.parametrize("normalize", ["rms", "trust", None])
@pytest.mark.parametrize("momentum", ["before", "after"])
@pytest.mark.parametrize(
    ("capturable", "nesterov", "make"),
    [(False, True, all_blocks), (True, False, kron_blocks), (True, False, diagkron_blocks)],
)
def test_theta_step(
    make: Maker, nesterov: bool, capturable: bool, momentum: str, normalize: str | None, launches: list[str]
) -> None:
    """Two steps against float64; λ changes before the last."""
    exact, ours = pair(make, weight_decay=0.1, beta=0.8, lr=0.05)
    options = {"momentum": momentum, "normalize": normalize, "nesterov": nesterov, "kappa": 1e-2}
    before = [theta(b) for b in exact]
    for step in (1, 2):
        if step == 2:
            for a, b in zip(exact, ours, strict=True):
                next(iter(a.structure.fishleg_aux.values())).mul_(2)
                next(iter(b.structure.fishleg_aux.values())).mul_(2)
        launches.clear()
        versions = [b.parts[0].param._version for b in ours]
        gs = matrices(ours, step)
        want, _ = steps.theta_step(exact, [g.double() for g in gs], ThetaOptions(**options, capturable=capturable))
        norms, ok = backend.theta_step(ours, gs, ThetaOptions(**options, capturable=capturable))
        assert ok and ok.dtype == torch.bool and relative(norms, want) <= CLOSE
        assert all(b.parts[0].param._version > v for b, v in zip(ours, versions, strict=True))
    made = ["copy_kernel", "refresh_kernel"]
    assert [name for name in launches if name in made] == {all_blocks: made, kron_blocks: made[1:]}.get(make, made[:1])
    launches = [name for name in launches if name not in made]
    assert len(launches) == {all_blocks: 6, kron_blocks: THETA_LAUNCHES[normalize], diagkron_blocks: 5}[make], launches
    for a, b, old in zip(exact, ours, before, strict=True):
        assert relative(theta(b) - old, theta(a) - old) <= CLOSE, b.shape
        assert relative(b.momentum, a.momentum) <= CLOSE and b.step == 2


@pytest.mark.parametrize(
    ("normalize", "make", "bad", "capturable"),
    [("rms", all_blocks, math.nan, False), ("trust", all_blocks, math.inf, True), (None, kron_blocks, math.inf, False)],
)
def test_a_gradient_that_is_not_finite_writes_nothing(make: Maker, normalize, bad: float, capturable: bool) -> None:
    _, blocks = pair(make)
    backend.theta_step(blocks, matrices(blocks, 1), ThetaOptions(normalize=normalize, capturable=capturable))
    before = everything(blocks)
    for index in (0, len(blocks) - 2, len(blocks) - 1):  # Kron's and DiagKron's kernels, and the reference's blocks
        gs = matrices(blocks, 2)
        gs[index][0, 0] = bad
        _, ok = backend.theta_step(blocks, gs, ThetaOptions(normalize=normalize, capturable=capturable))
        assert not ok
        assert_same(before, blocks)
    _, ok = backend.theta_step(blocks, matrices(blocks, 2), ThetaOptions(normalize=normalize, capturable=capturable))
    assert ok and all(b.step == 2 for b in blocks)


def test_zero_gradient_moves_nothing_but_the_decay() -> None:
    exact, ours = pair(all_blocks, weight_decay=0.5)
    gs = matrices(ours, 1)
    for zeros in (False, True):  # what is left of m does not move θ either
        before = [theta(b) for b in ours]
        gs = [torch.zeros_like(g) if zeros else g for g in gs]
        norms, ok = backend.theta_step(ours, gs, ThetaOptions())
        assert ok and bool(norms.all())
    for b, old in zip(ours, before, strict=True):
        assert relative(theta(b), 0.95 * old) <= 1e-6
    steps.theta_step(exact, [g.double() for g in matrices(exact, 1)], ThetaOptions())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_parameters_and_layouts(dtype: torch.dtype) -> None:
    """bfloat16 parameters in every layout, gradients in place, some missing, a group for each part, a tensor lr."""
    o = {"dtype": torch.float32}
    params = [
        [randn(12, 6, dtype=dtype).T, randn(6, dtype=dtype)],
        [randn(8, 3, 3, 3, dtype=dtype).to(memory_format=torch.channels_last), randn(8, dtype=dtype)],
        [randn(5, 3, dtype=dtype), randn(4, dtype=dtype)],
        [randn(7, 5, dtype=dtype).T, randn(5, dtype=dtype)],
    ]
    makes = [lambda: Kron(6, 13, **o), lambda: Kron(8, 28, **o), lambda: Diagonal((19, 1), **o)]
    makes.append(lambda: DiagKron(5, 8, **o))
    two = []
    for _ in range(2):
        blocks = []
        for k, (make, ps) in enumerate(zip(makes, params, strict=True)):
            block = tamed(make_block(make(), copy.deepcopy(ps), int(k != 2), k, weight_decay=0.1))
            other = {**block.groups[0], "lr": torch.tensor(0.2), "weight_decay": 0.3}
            block.groups = [block.groups[0], other]
            block.grads = [randn(*p.shape, seed=9, dtype=dtype) for p in ps]
            blocks.append(block)
        blocks[1].grads[1] = None
        two.append(blocks)
    poison(two[1])
    for b in two[0]:
        for part in b.parts:
            part.param.data = part.param.data.float()
    before = [theta(b) for b in two[0]]
    steps.theta_step(two[0], [GradientInPlace(b) for b in two[0]], ThetaOptions())
    backend.theta_step(two[1], [GradientInPlace(b) for b in two[1]], ThetaOptions())
    for a, b, old in zip(*two, before, strict=True):
        assert b.parts[0].param.dtype == dtype and b.parts[0].param.stride() == a.parts[0].param.stride()
        moved = relative(theta(a), old)
        assert moved > 0.015 and relative(theta(b), theta(a)) <= max(torch.finfo(dtype).eps, CLOSE * moved)
    assert torch.equal(two[1][1].parts[1].param, params[1][1])  # its gradient is missing


def test_plans_follow_what_changes() -> None:
    """Step after step on the same tensors, of which a plan is kept; then lr, gradients and parameters change places."""
    exact, ours = pair(factored_blocks, lr=0.05)
    gs = [[p.detach().clone() for p in (part.param for part in b.parts)] for b in ours]
    for step in range(6):
        for a, b, pieces in zip(exact, ours, gs, strict=True):
            if step == 2:
                a.groups[0]["lr"] = b.groups[0]["lr"] = 0.1
            if step == 3:  # another place
                b.parts[0].param.data = b.parts[0].param.data.clone()
                pieces[0] = pieces[0].clone()
                if "B" in (aux := b.structure.fishleg_aux):
                    aux["B"] = 2 * aux["B"]
                    a.structure.fishleg_aux["B"].mul_(2)
            pieces[0].mul_(-0.7)
            b.grads = [None if step == 4 and k else g for k, g in enumerate(pieces)]
            a.grads = [None if g is None else g.double() for g in b.grads]
        steps.theta_step(exact, [GradientInPlace(a) for a in exact], ThetaOptions())
        backend.theta_step(ours, [GradientInPlace(b) for b in ours], ThetaOptions())
        for a, b in zip(exact, ours, strict=True):
            assert relative(b.momentum, a.momentum) <= CLOSE and relative(theta(b), theta(a)) <= CLOSE, step


def test_plans_hold_while_another_backend_has_some_of_their_blocks() -> None:
    exact, ours = pair(kron_blocks, lr=0.05)
    for step in range(4):
        if step == 2:  # a plan is kept, of which the later blocks' workspaces are
            for b in ours[1:]:
                assert b.kept(BackendState) is b.kept(BackendState)
            gc.collect()
        for a, b in zip(exact, ours, strict=True):
            next(iter(a.structure.fishleg_aux.values())).mul_(1.1)
            next(iter(b.structure.fishleg_aux.values())).mul_(1.1)
            for g, wide in zip(b.grads, a.grads, strict=True):
                if g is not None and wide is not None:
                    wide.copy_(g.mul_(-0.7))
        steps.theta_step(exact, [GradientInPlace(a) for a in exact], ThetaOptions())
        backend.theta_step(ours, [GradientInPlace(b) for b in ours], ThetaOptions())
        for a, b in zip(exact, ours, strict=True):
            assert relative(b.momentum, a.momentum) <= CLOSE and relative(theta(b), theta(a)) <= CLOSE, step


def test_nothing_is_kept_alive() -> None:
    """Neither blocks nor gradients, by plans and workspaces."""
    blocks = [tamed(make_block(m(3, 4, dtype=torch.float32), [randn(3, 4).float()])) for m in (Kron, DiagKron)]
    for b in blocks:
        b.grads = [g.clone() for g in b.grads]
    backend.theta_step(blocks, [GradientInPlace(b) for b in blocks], ThetaOptions())
    us = [b.matrix(b.grads) for b in blocks]
    backend.lambda_step(blocks, us, us, us, LambdaOptions(damping=0.1, lr=0.01))
    gone = [weakref.ref(x) for b in blocks for x in (b, b.grads[0])]
    del blocks, us, b
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4


def test_large_blocks_are_multiplied_by_torch(monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> None:
    monkeypatch.setattr(configurations, "LIBRARY", 16)  # of which there are three
    exact, ours = pair(factored_blocks)
    gs = matrices(ours, 1)
    backend.refresh(ours)
    for b, g, v in zip(ours, gs, backend.qv(ours, gs), strict=True):
        assert relative(v, dense_qv(b, g)) <= CLOSE
    steps.theta_step(exact, [g.double() for g in gs], ThetaOptions(normalize="trust"))
    backend.theta_step(ours, gs, ThetaOptions(normalize="trust"))
    for a, b in zip(exact, ours, strict=True):
        assert relative(theta(b), theta(a)) <= CLOSE and relative(b.momentum, a.momentum) <= CLOSE
    assert launches.count("refresh_kernel") == 1  # P and S by half their tiles, of these blocks too
    assert sum(backend_kind(b) is None for b in ours) == 3 and launches.count("copy_kernel") == 1
    assert not configurations.library_product(64, 64, "bf16")


def test_rows_of_one_parameter() -> None:
    p, gs = nn.Parameter(randn(6, 3).float()), [randn(3, 3, seed=5).float(), randn(3, 3, seed=6).float()]
    old, blocks = p.detach().clone(), []
    for rows in (slice(0, 3), slice(3, 6)):
        block = tamed(make_block(Kron(3, 3, dtype=torch.float32), [randn(3, 3).float()], seed=rows.start))
        block.parts = [Part(p, rows)]
        blocks.append(block)
    backend.theta_step(blocks, gs, ThetaOptions(normalize=None))
    want = torch.cat([dense_qv(b, g) for b, g in zip(blocks, gs, strict=True)])
    assert relative(old - p, 0.1 * want) <= CLOSE


def test_momentum_with_padding() -> None:
    """As on a GPU: rows that begin at multiples of 16 elements."""
    exact, ours = pair(factored_blocks)
    for b in ours:
        m, n = b.shape
        b.momentum = torch.zeros(m, padded(n))[:, :n]
    for step in (1, 2):
        gs = matrices(ours, step)
        steps.theta_step(exact, [g.double() for g in gs], ThetaOptions())
        backend.theta_step(ours, gs, ThetaOptions())
    for a, b in zip(exact, ours, strict=True):
        assert relative(b.momentum, a.momentum) <= CLOSE and relative(theta(b), theta(a)) <= CLOSE
