"""The CUDA backend against the reference, all but λ, for test_cuda_steps.py (on the CPU) and test_cuda_device.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fishleg_fast import CategoricalLikelihood, FishLeg
from fishleg_fast.algebra.structures.kron import Kron
from fishleg_fast.backends import cuda, reference
from fishleg_fast.backends.protocol import ThetaOptions
from support.blocks import everything, make_block
from support.cuda_blocks import SHAPES, TOLERANCE, assert_close, layer, model, set_gradients, set_precision
from support.dense import dense_q, randn, relative

# Q u


@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32", "bf16"])
def test_qv_is_the_dense_product(device: torch.device, precision: str) -> None:
    blocks = [layer(device, m, n, i) for i, (m, n) in enumerate([*SHAPES, (64, 256), (129, 300)])]
    set_precision(blocks, precision)
    us = [randn(*b.shape, seed=i).float().to(device) for i, b in enumerate(blocks)]
    vs = cuda.qv(blocks, us)
    for b, u, v in zip(blocks, us, vs, strict=True):
        aux = {name: t.double() for name, t in b.structure.fishleg_aux.items()}
        want = aux["R"].T @ aux["R"] @ u.double() @ aux["L"] @ aux["L"].T
        assert relative(v, want) <= TOLERANCE[precision], b.shape
    small = blocks[1]
    want = dense_q(small.structure, {k: t.double() for k, t in small.structure.fishleg_aux.items()})
    assert relative(vs[1].reshape(-1), want @ us[1].double().reshape(-1)) <= TOLERANCE[precision]


@pytest.mark.parametrize("kind", ["split", "transposed", "wide"])
def test_qv_reads_u_where_it_is(device: torch.device, kind: str) -> None:
    blocks = model(device)
    us = set_gradients(blocks, 1)
    want = [reference.qv([b], [u.dense])[0] for b, u in zip(blocks, us, strict=True)]
    if kind == "split":
        c = torch.tensor(0.5, device=device)
        us, want = [u.scaled(c) for u in us], [0.5 * w for w in want]
    else:
        us = [u.dense.T.contiguous().T if kind == "transposed" else u.dense for u in us]
    for b, v, w in zip(blocks, cuda.qv(blocks, us), want, strict=True):
        assert relative(v, w) <= 2e-6, b.shape


def test_refresh_forms_symmetric_products_in_place(device: torch.device) -> None:
    blocks = [layer(device, m, n, i) for i, (m, n) in enumerate(SHAPES)]
    cuda.refresh(blocks)
    pointers = [b.structure.cache["P"].data_ptr() for b in blocks]
    for b in blocks:
        b.structure.fishleg_aux["R"].mul_(1.5)
    cuda.refresh(blocks, [(1, 1)] * len(blocks))
    assert pointers == [b.structure.cache["P"].data_ptr() for b in blocks]
    for b in blocks:
        R, L = (b.structure.fishleg_aux[name].double() for name in "RL")
        for got, want in ((b.structure.cache["P"], R.T @ R), (b.structure.cache["S"], L @ L.T)):
            assert relative(got, want) <= 1e-6
            assert torch.equal(got, got.T)


# θ step


@pytest.mark.parametrize(("nesterov", "capturable"), [(False, False), (True, True)])
@pytest.mark.parametrize("normalize", ["rms", "trust", None, "spectral"])
@pytest.mark.parametrize("momentum", ["before", "after"])
def test_theta_step(
    device: torch.device, nesterov: bool, momentum: str, normalize: str | None, capturable: bool
) -> None:
    options = {"nesterov": nesterov, "momentum": momentum, "normalize": normalize, "capturable": capturable}
    ours, theirs = (model(device, weight_decay=0.3, lr=0.05, beta=0.8) for _ in range(2))
    if capturable:
        for b in [*ours, *theirs]:
            b.step, b.aux_step = b.step.to(device), b.aux_step.to(device)
    for step in range(1, 4):
        norms, ok = cuda.theta_step(ours, set_gradients(ours, step), ThetaOptions(kappa=1e-2, **options))
        want, _ = reference.theta_step(theirs, set_gradients(theirs, step), ThetaOptions(kappa=1e-2, **options))
        assert bool(ok) and norms.dtype == want.dtype and relative(norms, want) <= 1e-5
    assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momentum", ["before", "after"])
def test_theta_step_of_16_bit_parameters(device: torch.device, dtype: torch.dtype, momentum: str) -> None:
    ours, theirs = (model(device, dtype, weight_decay=0.3, lr=0.05) for _ in range(2))
    for step in range(1, 3):
        cuda.theta_step(ours, set_gradients(ours, step), ThetaOptions(momentum=momentum))
        reference.theta_step(theirs, set_gradients(theirs, step), ThetaOptions(momentum=momentum))
    assert_close(ours, theirs, 2e-2)  # momentum averages gradients that are themselves equal
    for mine, other in zip(ours, theirs, strict=True):
        assert relative(mine.momentum, other.momentum) <= 1e-5


@pytest.mark.parametrize("precision", ["tf32x3", "tf32", "bf16"])
def test_theta_step_in_each_precision(device: torch.device, precision: str) -> None:
    ours, theirs = model(device), model(device)
    set_precision(ours, precision)
    before = [[p.param.detach().clone() for p in b.parts] for b in ours]
    cuda.theta_step(ours, set_gradients(ours, 1), ThetaOptions())
    reference.theta_step(theirs, set_gradients(theirs, 1), ThetaOptions())
    for a, b, old in zip(ours, theirs, before, strict=True):
        for p, q, o in zip(a.parts, b.parts, old, strict=True):
            assert relative(p.param - o, q.param - o) <= TOLERANCE[precision] + 1e-5, a.shape


def test_dense_gradients_and_a_mix_of_dtypes(device: torch.device) -> None:
    """Tensors as they come from F v; a float64 block makes the norms float64."""
    ours, theirs = model(device), model(device)
    for blocks in (ours, theirs):
        blocks.append(make_block(Kron(3, 4, dtype=torch.float64, device=device), [randn(3, 4).to(device)], seed=3))
    for step in (1, 2):
        gs = [randn(*b.shape, seed=10 * step + i, dtype=b.dtype).to(device) for i, b in enumerate(ours)]
        gs[1] = gs[1].T.contiguous().T
        norms, _ = cuda.theta_step(ours, gs, ThetaOptions())
        want, _ = reference.theta_step(theirs, gs, ThetaOptions())
        assert norms.dtype == want.dtype == torch.float64 and relative(norms, want) <= 1e-5
    assert_close(ours, theirs, 1e-5)


def test_missing_gradients_keep_their_parameters(device: torch.device) -> None:
    ours, theirs = (model(device, weight_decay=0.5) for _ in range(2))
    for blocks, op in ((ours, cuda), (theirs, reference)):
        gs = set_gradients(blocks, 1)
        for k in (2, 6, 8):
            blocks[k].grads = [blocks[k].grads[0], None]
        kept = [blocks[k].parts[1].param.clone() for k in (2, 6, 8)]
        op.theta_step(blocks, gs, ThetaOptions())
        assert all(torch.equal(t, blocks[k].parts[1].param) for t, k in zip(kept, (2, 6, 8), strict=True))
    assert_close(ours, theirs, 1e-5)


def test_each_part_follows_its_own_group_and_a_tensor_lr(device: torch.device) -> None:
    ours, theirs = model(device), model(device)
    for blocks, op in ((ours, cuda), (theirs, reference)):
        gs = set_gradients(blocks, 1)
        lr = torch.tensor(0.3, device=device)
        for b in blocks:
            b.groups = [{**b.groups[0], "lr": lr}, {**b.groups[0], "lr": 0.2, "weight_decay": 0.5}][: len(b.parts)]
        op.theta_step(blocks, gs, ThetaOptions(capturable=True))
    assert_close(ours, theirs, 1e-5)


def test_a_zero_gradient_keeps_its_block_under_rms(device: torch.device) -> None:
    ours, theirs = model(device), model(device)
    for blocks, op in ((ours, cuda), (theirs, reference)):
        op.theta_step(blocks, set_gradients(blocks, 1), ThetaOptions())
        kept = [p.param.clone() for k in (3, 4, 8) for p in blocks[k].parts]
        gs = set_gradients(blocks, 2)
        for k in (3, 4, 8):
            for g in blocks[k].grads:
                g.zero_()
        op.theta_step(blocks, gs, ThetaOptions())
        assert all(map(torch.equal, kept, [p.param for k in (3, 4, 8) for p in blocks[k].parts]))
    assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("momentum", ["before", "after"])
@pytest.mark.parametrize("k", [2, 3, 7, 8, 10])  # small, larger, scaled, diagonal, uncovered
def test_where_nat_is_not_finite_nothing_is_written(
    device: torch.device, k: int, momentum: str, capturable: bool
) -> None:
    blocks = model(device, weight_decay=0.1)
    cuda.theta_step(blocks, set_gradients(blocks, 1), ThetaOptions(momentum=momentum, capturable=capturable))
    before = everything(blocks)
    gs = set_gradients(blocks, 2)
    blocks[k].grads[0].reshape(-1)[-1] = float("nan") if capturable else float("inf")
    norms, ok = cuda.theta_step(blocks, gs, ThetaOptions(momentum=momentum, capturable=capturable))
    assert not ok and not torch.isfinite(norms[k])
    assert torch.isfinite(norms[:k]).all() and torch.isfinite(norms[k + 1 :]).all()
    assert all(map(torch.equal, before, everything(blocks)))
    _, ok = cuda.theta_step(blocks, set_gradients(blocks, 3), ThetaOptions(momentum=momentum, capturable=capturable))
    assert ok


def test_writes_are_seen_by_autograd_and_steps_repeat_bit_for_bit(device: torch.device) -> None:
    states = []
    for _ in range(2):
        blocks = model(device)
        versions = [b.parts[0].param._version for b in blocks]
        for step in (1, 2):
            cuda.theta_step(blocks, set_gradients(blocks, step), ThetaOptions())
        assert all(b.parts[0].param._version > v for b, v in zip(blocks, versions, strict=True))
        states.append(everything(blocks))
    assert all(map(torch.equal, *states))


# ⟨x, y⟩


def test_inner(device: torch.device) -> None:
    xs = [randn(n, seed=n).float().to(device) for n in (1, 63, 257, 4096, 9001)]
    ys = [randn(n, seed=n + 1).float().to(device) for n in (1, 63, 257, 4096, 9001)]
    xs += [xs[2].bfloat16(), randn(9, 6).float().to(device).T, torch.empty(0, device=device)]
    ys += [ys[2].half(), randn(9, 6, seed=1).float().to(device).T, torch.empty(0, device=device)]
    pairs = list(zip(xs, ys, strict=True))
    want = sum((x.double() * y.double()).sum() for x, y in pairs)
    got = cuda.inner(xs, ys)
    size = sum(x.double().norm() * y.double().norm() for x, y in pairs)
    assert got.dtype == torch.float32 and got.shape == ()
    assert (got.double() - want).abs() <= 1e-6 * size
    norm = cuda.inner(xs, xs)
    assert relative(norm, sum(x.double().square().sum() for x in xs)) <= 1e-6
    blocks = model(device)
    us = set_gradients(blocks, 1)
    assert relative(cuda.inner(us, us), reference.inner(us, us)) <= 1e-6
    vs = [u.dense for u in us]
    assert relative(cuda.inner(us, vs), reference.inner(us, us)) <= 1e-6
    double = [t.double() for t in xs]
    assert cuda.inner(double, double).dtype == torch.float64


# The optimizer


def trajectory(device: torch.device, steps: int, backend: Callable[[], object], **options: object) -> list[Tensor]:
    """Losses of a small convolutional model, and its parameters at the end."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.LayerNorm(36), nn.Linear(36, 40), nn.Tanh(),
        nn.Linear(40, 5),
    ).to(device)  # fmt: skip
    likelihood = CategoricalLikelihood()
    optimizer = FishLeg(
        net, likelihood=likelihood, lr=1e-2, seed=1, update_aux_every=2, anchor_every=7, backend="reference",
        precision="highest", **options,
    )  # fmt: skip
    optimizer._ops = optimizer._learner.ops = backend()
    inputs, targets = randn(32, 1, 8, 8).float().to(device), torch.arange(32, device=device) % 5
    losses = []
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            loss = likelihood.nll(targets, net(inputs))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return [torch.stack(losses), *(p.detach() for p in net.parameters())]


@pytest.mark.parametrize("options", [{}, {"normalize": "trust", "learn_scale": True}, {"capturable": True}])
def test_twenty_steps_of_training_follow_the_reference(device: torch.device, options: dict[str, object]) -> None:
    ours = trajectory(device, 20, lambda: cuda, **options)
    theirs = trajectory(device, 20, lambda: reference, **options)
    assert ours[0][-1] < 0.9 * ours[0][0]
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a, b) <= 1e-4
