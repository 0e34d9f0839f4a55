"""The λ step of the CUDA backend against the reference, for test_cuda_steps.py and test_cuda_device.py."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from fishleg_fast.algebra.structures.diagkron import DiagKron
from fishleg_fast.algebra.structures.diagonal import Diagonal
from fishleg_fast.algebra.structures.kron import Kron
from fishleg_fast.backends import cuda, reference
from fishleg_fast.backends.cuda import coverage, runtime, state
from fishleg_fast.backends.cuda.plans import Op
from fishleg_fast.backends.protocol import LambdaOptions, ThetaOptions
from fishleg_fast.model.block import Block
from fishleg_fast.model.gradients import GradientInPlace
from support.blocks import everything, make_block
from support.cuda_blocks import TOLERANCE, assert_close, layer, model, set_gradients, set_precision, shrunk
from support.dense import randn, relative


def aux_inputs(blocks: list[Block], op, step: int, scale: float = 0.1):
    """u where the parameters' gradients are, v and a random F v."""
    us = [u.scaled(torch.tensor(scale, device=u.block.momentum.device)) for u in set_gradients(blocks, step)]
    vs = op.qv(blocks, us)
    fvs = [randn(*b.shape, seed=77 * step + i, dtype=b.dtype).to(b.momentum.device) for i, b in enumerate(blocks)]
    return us, vs, [0.3 * f + 0.5 * v for f, v in zip(fvs, vs, strict=True)]


@pytest.mark.parametrize(("learn_scale", "capturable"), [(True, False), (False, True)])
@pytest.mark.parametrize("precondition", [False, True])
def test_lambda_step(device: torch.device, learn_scale: bool, precondition: bool, capturable: bool) -> None:
    # With a small eps Adam's steps would follow the sign of the smallest gradients, and so the last bit of sums.
    options = {"damping": 0.1, "lr": 1e-2, "eps": 1e-2, "precondition": precondition, "learn_scale": learn_scale}
    ours, theirs = model(device), model(device)
    if capturable:
        for b in [*ours, *theirs]:
            b.step, b.aux_step = b.step.to(device), b.aux_step.to(device)
    for step in range(1, 4):
        loss, ok = cuda.lambda_step(
            ours, *aux_inputs(ours, cuda, step), LambdaOptions(capturable=capturable, **options)
        )
        want, _ = reference.lambda_step(
            theirs, *aux_inputs(theirs, reference, step), LambdaOptions(capturable=capturable, **options)
        )
        assert bool(ok) and relative(loss, want) <= 1e-4
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.aux_step == other.aux_step == 3
        for name in mine.exp_avg:
            pairs = [(s.exp_avg[name], s.exp_avg_sq[name], s.structure.fishleg_aux[name]) for s in (mine, other)]
            assert max(map(relative, *pairs)) <= 2e-5, (mine.shape, name)


@pytest.mark.parametrize("precision", ["tf32x3", "tf32", "bf16"])
def test_lambda_gradients_in_each_precision(device: torch.device, precision: str) -> None:
    """By Adam's first moment, against autograd's gradient in float64."""
    blocks = [layer(device, m, n, i) for i, (m, n) in enumerate([(1, 1), (3, 5), (63, 66), (70, 31)])]
    set_precision(blocks, precision)
    us = [0.1 * randn(*b.shape, seed=i).float().to(device) for i, b in enumerate(blocks)]
    vs = [reference.qv([b], [u])[0] for b, u in zip(blocks, us, strict=True)]
    fvs = [randn(*b.shape, seed=i + 9).float().to(device) for i, b in enumerate(blocks)]
    wants = []
    for b, u, v, fv in zip(blocks, us, vs, fvs, strict=True):
        R, L = (b.structure.fishleg_aux[name].double().requires_grad_() for name in "RL")
        w = fv.double() + 0.1 * v.double() - u.double()
        with torch.enable_grad():
            s = (w * (R.T @ R @ u.double() @ L @ L.T)).sum()
            wants.append(dict(zip("RL", torch.autograd.grad(s, (R, L)), strict=True)))
    cuda.lambda_step(blocks, us, vs, fvs, LambdaOptions(damping=0.1, lr=1e-3))
    for b, want in zip(blocks, wants, strict=True):
        for name in "RL":
            # M and N mix positive and negative products, so their error is relative to larger sums.
            assert relative(b.exp_avg[name] / 0.1, want[name]) <= 5 * TOLERANCE[precision], (b.shape, name)


@pytest.mark.parametrize("bad", [(2, "inf"), (4, "nan"), (8, "inf"), (10, "nan"), (None, "zero")])
def test_where_a_gradient_is_not_finite_or_u_is_zero_lambda_stays(
    device: torch.device, bad: tuple[int | None, str]
) -> None:
    blocks = model(device)
    us, vs, fvs = aux_inputs(blocks, cuda, 1)
    if bad[0] is None:
        us, vs = [0 * u.dense for u in us], [0 * v for v in vs]
    else:
        fvs[bad[0]].reshape(-1)[3] = float(bad[1])
    before = everything(blocks)
    _, ok = cuda.lambda_step(blocks, us, vs, fvs, LambdaOptions(damping=0.1, lr=1e-2))
    assert not ok
    assert all(map(torch.equal, before, everything(blocks)))


def test_lambda_step_tells_the_cache(device: torch.device) -> None:
    blocks = [layer(device, 6, 5)]
    cuda.refresh(blocks)
    old = blocks[0].structure.version
    cuda.lambda_step(
        blocks, *aux_inputs(blocks, cuda, 1), LambdaOptions(damping=0.1, lr=torch.tensor(1e-2, device=device))
    )
    assert blocks[0].structure.version != old and not blocks[0].structure.holds("P")
    R = blocks[0].structure.fishleg_aux["R"].double()
    assert relative(blocks[0].structure.cache["P"], R.T @ R) <= 1e-6


def test_large_products_are_torchs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one rule, and with the same result."""
    monkeypatch.setattr(coverage, "LARGE", 60)
    ours, theirs = model(device), model(device)
    large = [b.shape for b in ours if "sides" in (coverage.why_uncovered(state.facts_of(b)) or "")]
    assert large == [(63, 66)]
    for step in (1, 2):
        cuda.theta_step(ours, set_gradients(ours, step), ThetaOptions())
        reference.theta_step(theirs, set_gradients(theirs, step), ThetaOptions())
    assert_close(ours, theirs, 1e-5)


def test_dimensions_that_do_not_run_on(device: torch.device) -> None:
    """A 3-d convolution's weight: with any gradient while contiguous, uncovered where it is not."""
    outcomes = []
    for op in (cuda, reference):
        weight = randn(4, 3, 2, 2, 3).float().to(device)
        plain = make_block(Kron(4, 36, dtype=torch.float32, device=device), [weight])
        last = weight.contiguous(memory_format=torch.channels_last_3d)
        blocks = [plain, make_block(Kron(4, 36, dtype=torch.float32, device=device), [last], seed=1)]
        blocks[0].grads = [randn(4, 3, 2, 2, 3, seed=3).float().to(device)]
        blocks[1].grads = [blocks[0].grads[0].contiguous(memory_format=torch.channels_last_3d)]
        for b in blocks:
            shrunk(b)
        op.theta_step(blocks, [GradientInPlace(b) for b in blocks], ThetaOptions())
        outcomes.append(everything(blocks))
    assert coverage.why_uncovered(state.facts_of(blocks[0])) is None
    assert (
        coverage.why_uncovered(state.facts_of(blocks[1])) == "a parameter has more dimensions than the kernels follow"
    )
    assert max(map(relative, *outcomes)) <= 1e-5


def test_an_empty_block_and_one_without_plans(device: torch.device) -> None:
    options = {"dtype": torch.float32, "device": device}
    blocks = [
        make_block(Diagonal((0, 1), **options), [torch.zeros(0, device=device)], 0),
        layer(device, 3, 4),
    ]
    before = blocks[1].parts[0].param.clone()
    norms, ok = cuda.theta_step(blocks, set_gradients(blocks, 1), ThetaOptions())
    assert ok and norms[0] == 0 and not torch.equal(before, blocks[1].parts[0].param)
    loss, ok = cuda.lambda_step(blocks, *aux_inputs(blocks, cuda, 1), LambdaOptions(damping=0.1, lr=1e-2))
    assert ok and torch.isfinite(loss)
    uncovered = [make_block(DiagKron(5, 3, **options), [randn(5, 3).float().to(device)])]
    norms, ok = cuda.theta_step(uncovered, set_gradients(uncovered, 1), ThetaOptions())
    assert ok and norms.shape == (1,)


def test_plans_follow_gradients_and_are_dropped_with_their_blocks(device: torch.device) -> None:
    """Moved gradients need no new plan, other layouts do; a model that is gone takes its plans along."""
    blocks = [layer(device, 6, 5), layer(device, 3, 4, seed=1)]
    for step in range(3):
        cuda.theta_step(blocks, set_gradients(blocks, step), ThetaOptions())
    kept = blocks[0].kept(state.CudaState).plans
    assert sum(key[0] is Op.THETA for key in kept) == 1
    gs = set_gradients(blocks, 4)
    blocks[0].grads[0] = blocks[0].grads[0].T.contiguous().T
    cuda.theta_step(blocks, gs, ThetaOptions())
    assert sum(key[0] is Op.THETA for key in kept) == 2
    for columns in range(40):  # never more than a few
        cuda.theta_step(
            blocks, [randn(6, 5 + columns)[:, :5].float().to(device), randn(3, 4).float().to(device)], ThetaOptions()
        )
    assert len(kept) <= state.MOST_PLANS
    plans = [weakref.ref(plan) for plan in kept.values()]
    del blocks, kept, gs
    gc.collect()
    assert plans and all(plan() is None for plan in plans)


def test_a_plan_refuses_what_its_kernels_could_not_follow(device: torch.device) -> None:
    extension = runtime.runtime().extension
    part = ((4, 3), (3, 1), (3, 1), 0, 0, 0, -1)
    with pytest.raises(ValueError, match="block 'fc': its parts have 12 entries, not 20"):
        extension.CudaPlan(2, [("fc", 1, 0, 4, 5, 1, [part], False)], 0)
    with pytest.raises(ValueError, match="block 'fc': axis should be 0 or 1 but is 2"):
        extension.CudaPlan(2, [("fc", 1, 0, 4, 3, 2, [part], False)], 0)
    with pytest.raises(ValueError, match="block 'fc': a parameter should have at most 4 dimensions"):
        shape, strides = (2,) * 5, (1, 2, 4, 8, 16)
        extension.CudaPlan(2, [("fc", 1, 0, 2, 16, 1, [(shape, strides, strides, 0, 0, 0, -1)], False)], 0)
    with pytest.raises(ValueError, match="block 'fc': polar factors are of matrices, in a θ step"):
        extension.CudaPlan(2, [("fc", 1, 0, 4, 3, 1, [part], True)], 0)
    plan = extension.CudaPlan(2, [("fc", 1, 0, 4, 3, 1, [part], False)], 0)
    g, P, S, out = (torch.zeros(*shape, device=device) for shape in ((4, 3), (4, 4), (3, 3), (4, 3)))
    with pytest.raises(ValueError, match="needs 1 gradients but there are 2"):
        plan.qv(0, 0, [g, g], None, [P, S, None], [out])
    with pytest.raises(ValueError, match="needs 3 operators but there are 2"):
        plan.qv(0, 0, [g], None, [P, S], [out])
    lie = [([g.T], [P, S, None], [out]), ([g.double()], [P, S, None], [out]), ([g], [S, S, None], [out])]
    lie += [([g], [P, S.bfloat16(), None], [out]), ([g], [P, S, None], [out[:, ::2]]), ([g], [P, S, g.T], [out])]
    lie += [([g.to_sparse()], [P, S, None], [out]), ([g.tolist()], [P, S, None], [out])]
    for gradients, operators, outs in lie:
        assert plan.qv(0, 0, gradients, None, operators, outs) is False
