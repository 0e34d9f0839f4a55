"""The CUDA backend against the reference, for test_cuda_steps.py (kernels on the CPU) and test_cuda_device.py.

A module with these tests has a fixture ``device``: where the kernels run. Workspaces are full of NaN before each op.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import pytest
import torch
from dense import dense_q, randn, relative
from test_reference_steps import everything, make_block
from torch import Tensor

from fishleg_fast import cuda, cuda_plans, reference
from fishleg_fast.blocks import Block
from fishleg_fast.reference.thin import Split
from fishleg_fast.structures import DiagKron, Diagonal, Kron, SumKron

# ‖error‖/‖float64's‖ of a product; tf32 has 10 bits of fraction, bf16 7.
TOLERANCE = {"ieee": 2e-6, "tf32x3": 3e-6, "tf32": 2e-3, "bf16": 2e-2}
SHAPES = [(1, 1), (3, 5), (63, 66), (257, 31), (5, 257)]  # the last two are too large for a chain


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch):
    """As an optimizer calls its ops, on workspaces that hold nothing."""
    plan_of = cuda_plans.plan_of

    def poisoned(*arguments: object) -> cuda_plans.Plan:
        plan = plan_of(*arguments)  # type: ignore[arg-type]
        plan.workspace.fill_(255)
        return plan

    monkeypatch.setattr(cuda, "plan_of", poisoned)
    with torch.no_grad():
        yield


def shrunk(block: Block) -> Block:
    """λ of a size at which products neither grow nor vanish."""
    for name, t in block.structure.fishleg_aux.items():
        if name[0] in "RL":
            t.div_(max(t.shape[-1], 1) ** 0.5)
    return block


def layer(device: torch.device, m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32, **group: object):
    """A Kron block of a layer (m, n−1) with a bias, or of a weight alone where n is 1."""
    structure = Kron(m, n, dtype=torch.float32, device=device)
    sizes = [(m, n - 1), (m,)] if n > 1 else [(m, n)]
    params = [randn(*size, seed=seed + i, dtype=dtype).to(device) for i, size in enumerate(sizes)]
    return shrunk(make_block(structure, params, 1, seed, **group))


def model(device: torch.device, dtype: torch.dtype = torch.float32, **group: object) -> list[Block]:
    """Blocks of many shapes and layouts, transposed and channels-last among them; ours and outside."""
    options = {"dtype": torch.float32, "device": device}

    def new(structure, *params: Tensor, axis: int = 1, seed: int = 0) -> Block:
        return shrunk(make_block(structure, [p.to(device, dtype) for p in params], axis, seed, **group))

    convolution = randn(4, 3, 2, 3, seed=40).to(device, dtype).contiguous(memory_format=torch.channels_last)
    return [
        *(layer(device, m, n, i, dtype, **group) for i, (m, n) in enumerate(SHAPES)),
        new(Kron(9, 6, **options), randn(6, 9, seed=41).T, seed=1),
        new(Kron(4, 19, **options), convolution, randn(4, seed=42), seed=2),
        new(Kron(7, 11, scale=True, **options), randn(7, 11, seed=43), seed=3),
        new(Diagonal((5007, 1), **options), randn(5000, seed=44), randn(7, seed=45), axis=0, seed=4),
        new(Diagonal((257, 63), **options), randn(257, 63, seed=46), seed=5),
        new(DiagKron(5, 3, **options), randn(5, 3, seed=47), seed=6),
        new(SumKron(4, 6, **options), randn(4, 6, seed=48), seed=7),
        new(Kron(12, 10, max_factor_size=4, **options), randn(12, 10, seed=49), seed=8),
    ]


def set_gradients(blocks: Sequence[Block], step: int) -> list[Split]:
    """Random gradients in ``block.grads``, laid out and typed as their parameters are."""
    for i, block in enumerate(blocks):
        grads: list[Tensor | None] = []
        for j, part in enumerate(block.parts):
            p = part.of(part.param)
            grad = torch.empty_like(p)  # keeps strides
            grad.copy_(randn(*p.shape, seed=1000 * step + 10 * i + j))
            grads.append(grad)
        block.grads = grads
    return [Split(b) for b in blocks]


def assert_close(ours: list[Block], theirs: list[Block], tolerance: float) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        names = [f"{mine.shape} {i}" for i in range(len(everything([mine])))]
        for name, a, b in zip(names, everything([mine]), everything([other]), strict=True):
            wide = tolerance if a.dtype == torch.float32 else 4 * torch.finfo(a.dtype).eps
            assert relative(a.float(), b.float()) <= wide, name


def set_precision(blocks: list[Block], precision: str) -> None:
    for block in blocks:
        block.structure.precision = precision


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
@pytest.mark.parametrize("normalize", ["rms", "trust", None])
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
        norms, ok = cuda.theta_step(ours, set_gradients(ours, step), kappa=1e-2, **options)
        want, _ = reference.theta_step(theirs, set_gradients(theirs, step), kappa=1e-2, **options)
        assert bool(ok) and norms.dtype == want.dtype and relative(norms, want) <= 1e-5
    assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momentum", ["before", "after"])
def test_theta_step_of_16_bit_parameters(device: torch.device, dtype: torch.dtype, momentum: str) -> None:
    ours, theirs = (model(device, dtype, weight_decay=0.3, lr=0.05) for _ in range(2))
    for step in range(1, 3):
        cuda.theta_step(ours, set_gradients(ours, step), momentum=momentum)
        reference.theta_step(theirs, set_gradients(theirs, step), momentum=momentum)
    assert_close(ours, theirs, 2e-2)  # momentum averages gradients that are themselves equal
    for mine, other in zip(ours, theirs, strict=True):
        assert relative(mine.momentum, other.momentum) <= 1e-5


@pytest.mark.parametrize("precision", ["tf32x3", "tf32", "bf16"])
def test_theta_step_in_each_precision(device: torch.device, precision: str) -> None:
    ours, theirs = model(device), model(device)
    set_precision(ours, precision)
    before = [[p.param.detach().clone() for p in b.parts] for b in ours]
    cuda.theta_step(ours, set_gradients(ours, 1))
    reference.theta_step(theirs, set_gradients(theirs, 1))
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
        norms, _ = cuda.theta_step(ours, gs)
        want, _ = reference.theta_step(theirs, gs)
        assert norms.dtype == want.dtype == torch.float64 and relative(norms, want) <= 1e-5
    assert_close(ours, theirs, 1e-5)


def test_missing_gradients_keep_their_parameters(device: torch.device) -> None:
    ours, theirs = (model(device, weight_decay=0.5) for _ in range(2))
    for blocks, op in ((ours, cuda), (theirs, reference)):
        gs = set_gradients(blocks, 1)
        for k in (2, 6, 8):
            blocks[k].grads = [blocks[k].grads[0], None]
        kept = [blocks[k].parts[1].param.clone() for k in (2, 6, 8)]
        op.theta_step(blocks, gs)
        assert all(torch.equal(t, blocks[k].parts[1].param) for t, k in zip(kept, (2, 6, 8), strict=True))
    assert_close(ours, theirs, 1e-5)


def test_each_part_follows_its_own_group_and_a_tensor_lr(device: torch.device) -> None:
    ours, theirs = model(device), model(device)
    for blocks, op in ((ours, cuda), (theirs, reference)):
        gs = set_gradients(blocks, 1)
        lr = torch.tensor(0.3, device=device)
        for b in blocks:
            b.groups = [{**b.groups[0], "lr": lr}, {**b.groups[0], "lr": 0.2, "weight_decay": 0.5}][: len(b.parts)]
        op.theta_step(blocks, gs, capturable=True)
    assert_close(ours, theirs, 1e-5)


def test_a_zero_gradient_keeps_its_block_under_rms(device: torch.device) -> None:
    ours, theirs = model(device), model(device)
    for blocks, op in ((ours, cuda), (theirs, reference)):
        op.theta_step(blocks, set_gradients(blocks, 1))
        kept = [p.param.clone() for k in (3, 4, 8) for p in blocks[k].parts]
        gs = set_gradients(blocks, 2)
        for k in (3, 4, 8):
            for g in blocks[k].grads:
                g.zero_()
        op.theta_step(blocks, gs)
        assert all(map(torch.equal, kept, [p.param for k in (3, 4, 8) for p in blocks[k].parts]))
    assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("momentum", ["before", "after"])
@pytest.mark.parametrize("k", [2, 3, 7, 8, 10])  # a small block, a larger one, a scaled one, a diagonal, one outside
def test_where_nat_is_not_finite_nothing_is_written(
    device: torch.device, k: int, momentum: str, capturable: bool
) -> None:
    blocks = model(device, weight_decay=0.1)
    cuda.theta_step(blocks, set_gradients(blocks, 1), momentum=momentum, capturable=capturable)
    before = everything(blocks)
    gs = set_gradients(blocks, 2)
    blocks[k].grads[0].reshape(-1)[-1] = float("nan") if capturable else float("inf")
    norms, ok = cuda.theta_step(blocks, gs, momentum=momentum, capturable=capturable)
    assert not ok and not torch.isfinite(norms[k])
    assert torch.isfinite(norms[:k]).all() and torch.isfinite(norms[k + 1 :]).all()
    assert all(map(torch.equal, before, everything(blocks)))
    _, ok = cuda.theta_step(blocks, set_gradients(blocks, 3), momentum=momentum, capturable=capturable)
    assert ok


def test_writes_are_seen_by_autograd_and_steps_repeat_bit_for_bit(device: torch.device) -> None:
    states = []
    for _ in range(2):
        blocks = model(device)
        versions = [b.parts[0].param._version for b in blocks]
        for step in (1, 2):
            cuda.theta_step(blocks, set_gradients(blocks, step))
        assert all(b.parts[0].param._version > v for b, v in zip(blocks, versions, strict=True))
        states.append(everything(blocks))
    assert all(map(torch.equal, *states))


# λ step


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
        loss, ok = cuda.lambda_step(ours, *aux_inputs(ours, cuda, step), capturable=capturable, **options)
        want, _ = reference.lambda_step(theirs, *aux_inputs(theirs, reference, step), capturable=capturable, **options)
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
    cuda.lambda_step(blocks, us, vs, fvs, damping=0.1, lr=1e-3)
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
    _, ok = cuda.lambda_step(blocks, us, vs, fvs, damping=0.1, lr=1e-2)
    assert not ok
    assert all(map(torch.equal, before, everything(blocks)))


def test_lambda_step_tells_the_cache(device: torch.device) -> None:
    blocks = [layer(device, 6, 5)]
    cuda.refresh(blocks)
    old = blocks[0].structure.version
    cuda.lambda_step(blocks, *aux_inputs(blocks, cuda, 1), damping=0.1, lr=torch.tensor(1e-2, device=device))
    assert blocks[0].structure.version != old and not blocks[0].structure.holds("P")
    R = blocks[0].structure.fishleg_aux["R"].double()
    assert relative(blocks[0].structure.cache["P"], R.T @ R) <= 1e-6


def test_large_products_are_torchs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one rule, and with the same result."""
    monkeypatch.setattr(cuda_plans, "LARGE", 60)
    ours, theirs = model(device), model(device)
    large = [b.shape for b in ours if "sides" in (cuda.why_outside(cuda.known(b)) or "")]
    assert large == [(63, 66)]
    for step in (1, 2):
        cuda.theta_step(ours, set_gradients(ours, step))
        reference.theta_step(theirs, set_gradients(theirs, step))
    assert_close(ours, theirs, 1e-5)


def test_dimensions_that_do_not_run_on(device: torch.device) -> None:
    """A 3-d convolution's weight: with any gradient while contiguous, outside where it is not."""
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
        op.theta_step(blocks, [Split(b) for b in blocks])
        outcomes.append(everything(blocks))
    assert cuda.why_outside(cuda.known(blocks[0])) is None
    assert cuda.why_outside(cuda.known(blocks[1])) == "a parameter has more dimensions than the kernels follow"
    assert max(map(relative, *outcomes)) <= 1e-5


def test_an_empty_block_and_one_without_plans(device: torch.device) -> None:
    options = {"dtype": torch.float32, "device": device}
    blocks = [
        make_block(Diagonal((0, 1), **options), [torch.zeros(0, device=device)], 0),
        layer(device, 3, 4),
    ]
    before = blocks[1].parts[0].param.clone()
    norms, ok = cuda.theta_step(blocks, set_gradients(blocks, 1))
    assert ok and norms[0] == 0 and not torch.equal(before, blocks[1].parts[0].param)
    loss, ok = cuda.lambda_step(blocks, *aux_inputs(blocks, cuda, 1), damping=0.1, lr=1e-2)
    assert ok and torch.isfinite(loss)
    outside = [make_block(DiagKron(5, 3, **options), [randn(5, 3).float().to(device)])]
    norms, ok = cuda.theta_step(outside, set_gradients(outside, 1))
    assert ok and norms.shape == (1,)


def test_plans_follow_gradients_and_are_dropped_with_their_blocks(device: torch.device) -> None:
    """Moved gradients need no new plan, other layouts do; a model that is gone takes its plans along."""
    import gc

    blocks = [layer(device, 6, 5), layer(device, 3, 4, seed=1)]
    for step in range(3):
        cuda.theta_step(blocks, set_gradients(blocks, step))
    plans = cuda_plans._plans[blocks[0]]
    assert sum(key[0] is cuda_plans.Op.THETA for key in plans) == 1
    gs = set_gradients(blocks, 4)
    blocks[0].grads[0] = blocks[0].grads[0].T.contiguous().T
    cuda.theta_step(blocks, gs)
    assert sum(key[0] is cuda_plans.Op.THETA for key in plans) == 2
    for columns in range(40):  # never more than a few
        cuda.theta_step(blocks, [randn(6, 5 + columns)[:, :5].float().to(device), randn(3, 4).float().to(device)])
    assert len(plans) <= cuda_plans.MOST_PLANS
    gone = len(cuda_plans._plans)
    del blocks, plans, gs
    gc.collect()
    assert len(cuda_plans._plans) < gone


def test_a_plan_refuses_what_its_kernels_could_not_follow(device: torch.device) -> None:
    extension = cuda_plans.machine().extension
    part = ((4, 3), (3, 1), (3, 1), 0, 0, 0)
    with pytest.raises(ValueError, match="block 'fc': its parts have 12 entries, not 20"):
        extension.CudaPlan(2, [("fc", 1, 0, 4, 5, 1, [part])], 0)
    with pytest.raises(ValueError, match="block 'fc': axis should be 0 or 1 but is 2"):
        extension.CudaPlan(2, [("fc", 1, 0, 4, 3, 2, [part])], 0)
    with pytest.raises(ValueError, match="block 'fc': a parameter should have at most 4 dimensions"):
        shape, strides = (2,) * 5, (1, 2, 4, 8, 16)
        extension.CudaPlan(2, [("fc", 1, 0, 2, 16, 1, [(shape, strides, strides, 0, 0, 0)])], 0)
    plan = extension.CudaPlan(2, [("fc", 1, 0, 4, 3, 1, [part])], 0)
    with pytest.raises(ValueError, match="block 'fc': P has no memory"):
        plan.qv(0, 0, array("q", [0] * 8))
    for count, words in ((7, "too few"), (9, "too many")):
        with pytest.raises(ValueError, match=words):
            plan.qv(0, 0, array("q", [16, 4, 16, 3, 0, 16, *[0] * (count - 6)]))


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
    from torch import nn

    from fishleg_fast import CategoricalLikelihood, FishLeg

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
    optimizer._ops = optimizer._aux.ops = backend()
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
