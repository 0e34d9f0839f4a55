"""The θ step and the λ step of every backend for CPUs against loops over scalars, dense Q(λ) and torch.optim.Adam."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from dense import dense_q, randn, randomise, relative
from torch import Tensor, nn

from fishleg_fast.blocks import Block, Part
from fishleg_fast.reference import steps  # or the ops of another backend, by each_backend
from fishleg_fast.structure import Structure
from fishleg_fast.structures import DiagKron, Diagonal, Kron, SumKron

pytestmark = pytest.mark.usefixtures("each_backend")

EXACT = {False: 1e-11, True: 1e-6}  # by capturable: the count of steps is then a float32 tensor, and so are powers of β


@pytest.fixture(autouse=True)
def _no_grad():
    """As an optimizer calls its ops."""
    with torch.no_grad():
        yield


STRUCTURES = {
    "kron": lambda m, n, **o: Kron(m, n, **o),
    "kron-scale": lambda m, n, **o: Kron(m, n, scale=True, **o),
    "diagkron": lambda m, n, **o: DiagKron(m, n, **o),
    "sumkron": lambda m, n, **o: SumKron(m, n, **o),
    "diagonal": lambda m, n, **o: Diagonal((m, n), **o),
    "blocks": lambda m, n, **o: Kron(m, n, max_factor_size=2, **o),
}


def make_block(structure: Structure, params: list[Tensor], axis: int = 1, seed: int = 0, **group: object) -> Block:
    """A block of ``params`` side by side, with random λ, as the optimizer hands it to an op."""
    randomise(structure, seed)
    with torch.no_grad():
        for t in structure.fishleg_aux.values():
            t.mul_(0.7)
    block = Block("block", [Part(nn.Parameter(p)) for p in params], axis, structure)
    block.allocate(on_device=False)
    options = {"lr": 0.1, "beta": 0.9, "weight_decay": 0.0, "maximize": False, "base_lr": 0.1, **group}
    block.groups = [options for _ in params]
    block.grads = list(params)
    return block


def make_blocks(dtype: torch.dtype = torch.float64, **group: object) -> list[Block]:
    """A layer with a bias (3, 4+1), a matrix (2, 3) and a norm's weight and bias, 2·4, below each other."""
    options = {"dtype": dtype}
    return [
        make_block(Kron(3, 5, **options), [randn(3, 4, dtype=dtype), randn(3, seed=1, dtype=dtype)], **group),
        make_block(DiagKron(2, 3, **options), [randn(2, 3, seed=2, dtype=dtype)], seed=1, **group),
        make_block(
            Diagonal((8, 1), **options), [randn(4, seed=3, dtype=dtype), randn(4, seed=4, dtype=dtype)], 0, 2, **group
        ),
    ]


def gradients(blocks: list[Block], step: int) -> list[Tensor]:
    return [randn(*b.shape, seed=100 * step + i, dtype=b.dtype) for i, b in enumerate(blocks)]


def theta(block: Block) -> Tensor:
    """The block's matrix, read off its parameters without the block's own methods."""
    values = [p.param.detach() for p in block.parts]
    if block.axis == 0:
        return torch.cat([v.reshape(-1, 1) for v in values])
    return torch.cat([v.reshape(v.shape[0], -1) for v in values], dim=1)


def everything(blocks: list[Block]) -> list[Tensor]:
    """All that a step may write to."""
    tensors = []
    for b in blocks:
        tensors += [p.param.detach() for p in b.parts] + [b.momentum, b.step, b.aux_step]
        tensors += [*b.structure.fishleg_aux.values(), *b.exp_avg.values(), *b.exp_avg_sq.values()]
    return [t.clone() for t in tensors]


def assert_same(before: list[Tensor], blocks: list[Block]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(before, everything(blocks), strict=True))


def dense_theta_steps(
    blocks: list[Block], count: int, momentum: str, normalize: str | None, kappa: float, nesterov: bool = False
) -> list[Tensor]:
    """θ of each block after ``count`` steps, by float64 loops over scalars."""
    Qs = [dense_q(b.structure, b.structure.fishleg_aux).double() for b in blocks]
    thetas = [theta(b).double().reshape(-1) for b in blocks]
    averages = [torch.zeros_like(t) for t in thetas]
    for step in range(1, count + 1):
        gs = [g.double().reshape(-1) for g in gradients(blocks, step)]
        nats, paired = [], []
        for k, (b, g) in enumerate(zip(blocks, gs, strict=True)):
            beta = b.groups[0]["beta"]
            x = g if momentum == "before" else Qs[k] @ g
            averages[k] = torch.stack([beta * m + (1 - beta) * y for m, y in zip(averages[k], x, strict=True)])
            corrected = averages[k] / (1 - beta**step)
            if nesterov:
                ahead = [beta * m + (1 - beta) * y for m, y in zip(averages[k], x, strict=True)]
                corrected = torch.stack(ahead) / (1 - beta ** (step + 1))
            nats.append(Qs[k] @ corrected if momentum == "before" else corrected)
            paired.append(corrected if momentum == "before" else g)
        length = sum(
            sum((b.groups[0]["base_lr"] ** 2 * m * n).item() for m, n in zip(ms, nat, strict=True))
            for b, ms, nat in zip(blocks, paired, nats, strict=True)
        )
        for k, (b, nat) in enumerate(zip(blocks, nats, strict=True)):
            c = 1.0
            if normalize == "rms":
                rms = math.sqrt(sum(float(x) ** 2 for x in nat) / len(nat))
                c = 0.2 / rms if rms else 0.0
            elif normalize == "trust" and length > 0:
                c = min(1.0, math.sqrt(kappa / length))
            lr, decay = b.groups[0]["lr"], b.groups[0]["weight_decay"]
            thetas[k] = thetas[k] - lr * (c * nat + decay * thetas[k])
    return [t.reshape(b.shape) for t, b in zip(thetas, blocks, strict=True)]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("normalize", ["rms", "trust", None])
@pytest.mark.parametrize("momentum", ["before", "after"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_theta_step(
    nesterov: bool, momentum: str, normalize: str | None, weight_decay: float, capturable: bool
) -> None:
    blocks = make_blocks(weight_decay=weight_decay, lr=0.05, beta=0.8)
    before = [theta(b) for b in blocks]
    options = {"momentum": momentum, "normalize": normalize, "kappa": 1e-2, "nesterov": nesterov}
    want = dense_theta_steps(blocks, 4, **options)
    for step in range(1, 5):
        norms, ok = steps.theta_step(blocks, gradients(blocks, step), **options, capturable=capturable)
        assert bool(ok) and norms.shape == (3,)
    for b, w, old in zip(blocks, want, before, strict=True):
        assert relative(theta(b) - old, w - old) <= EXACT[capturable]
        assert b.step == 4


def test_trust_region_binds_and_lets_go() -> None:
    """A large κ leaves the step as it stands; a small one shortens it to lr₀²·mᵀnat = κ over all blocks together."""
    moves = {}
    for kappa in (1e6, 1e-4):
        blocks = make_blocks(beta=0.0)
        before, gs = [theta(b) for b in blocks], gradients(blocks, 1)
        steps.theta_step(blocks, gs, normalize="trust", kappa=kappa)
        moves[kappa] = [old - theta(b) for b, old in zip(blocks, before, strict=True)]
    products = sum((g * (d / 0.1)).sum().item() for g, d in zip(gs, moves[1e6], strict=True))
    shrink = math.sqrt(1e-4 / (0.1**2 * products))
    assert shrink < 1
    for free, bound in zip(moves[1e6], moves[1e-4], strict=True):
        assert relative(bound, shrink * free) <= 1e-9


def test_rms_of_a_step_is_a_fifth_of_lr_whatever_the_gradients_scale() -> None:
    for scale in (1e-12, 1.0, 1e12):
        blocks = make_blocks()
        before, gs = [theta(b) for b in blocks], [scale * g for g in gradients(blocks, 1)]
        norms, _ = steps.theta_step(blocks, gs)
        for b, old, norm, g in zip(blocks, before, norms, gs, strict=True):
            assert relative((theta(b) - old).square().mean().sqrt() / 0.1, torch.tensor(0.2)) <= 1e-6
            nat = dense_q(b.structure, b.structure.fishleg_aux) @ g.reshape(-1)
            assert relative(norm, nat.norm()) <= 1e-12  # what is returned is before the scaling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_theta_step_in_lower_precision(dtype: torch.dtype) -> None:
    """bfloat16 parameters have float32 λ and moving averages."""
    params = [randn(3, 4, dtype=dtype), randn(3, seed=1, dtype=dtype)]
    block = make_block(Kron(3, 5, dtype=torch.float32), params, weight_decay=0.1)
    want = dense_theta_steps([block], 2, "before", "rms", 1.0)[0]
    for step in (1, 2):
        steps.theta_step([block], gradients([block], step))
    assert block.parts[0].param.dtype == dtype and block.momentum.dtype == torch.float32
    assert relative(theta(block), want) <= 4 * torch.finfo(dtype).eps


def test_missing_gradients_keep_their_parameters() -> None:
    """A part without a gradient does not move, by decay neither; the others move as if its gradient were zero."""
    block, twin = make_blocks(weight_decay=0.5)[0], make_blocks(weight_decay=0.5)[0]
    bias = block.parts[1].param.detach().clone()
    g = randn(3, 5, seed=9)
    g[:, -1] = 0
    block.grads = [block.grads[0], None]
    steps.theta_step([block], [g])
    steps.theta_step([twin], [g])
    assert torch.equal(block.parts[1].param, bias)
    assert torch.equal(block.parts[0].param, twin.parts[0].param)
    assert not torch.equal(twin.parts[1].param, bias)


def test_each_part_follows_its_own_group() -> None:
    block, plain = make_blocks()[0], make_blocks()[0]
    block.groups = [block.groups[0], {**block.groups[0], "lr": 0.2, "weight_decay": 0.5}]
    bias, old = block.parts[1].param.detach().clone(), plain.parts[1].param.detach().clone()
    g = randn(3, 5, seed=9)
    steps.theta_step([block], [g])
    steps.theta_step([plain], [g])
    assert torch.equal(block.parts[0].param, plain.parts[0].param)
    want = bias - 0.2 * ((old - plain.parts[1].param.detach()) / 0.1 + 0.5 * bias)
    assert relative(block.parts[1].param.detach(), want) <= 1e-12


def test_blocks_of_rows_and_tensor_lr() -> None:
    """Two blocks over the rows of one parameter, as attention has them, and a tensor lr."""
    for capturable in (False, True):
        p = nn.Parameter(randn(6, 3))
        old, Qs, gs = p.detach().clone(), [], [randn(3, 3, seed=5), randn(3, 3, seed=6)]
        blocks = []
        for rows in (slice(0, 3), slice(3, 6)):
            block = make_block(Kron(3, 3, dtype=torch.float64), [randn(3, 3)], seed=rows.start, lr=torch.tensor(0.1))
            block.parts = [Part(p, rows)]
            blocks.append(block)
            Qs.append(dense_q(block.structure, block.structure.fishleg_aux))
        steps.theta_step(blocks, gs, normalize=None, capturable=capturable)
        want = torch.cat([(Q @ g.reshape(-1)).reshape(3, 3) for Q, g in zip(Qs, gs, strict=True)])
        assert relative(old - p.detach(), 0.1 * want) <= 1e-6  # lr is a float32 tensor


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("normalize", ["rms", "trust", None])
@pytest.mark.parametrize("momentum", ["before", "after"])
def test_a_gradient_that_is_not_finite_writes_nothing(momentum, normalize, bad: float, capturable: bool) -> None:
    blocks = make_blocks(weight_decay=0.1)
    options = {"momentum": momentum, "normalize": normalize, "capturable": capturable}
    steps.theta_step(blocks, gradients(blocks, 1), **options)
    before, gs = everything(blocks), gradients(blocks, 2)
    gs[1][0, 0] = bad
    _, ok = steps.theta_step(blocks, gs, **options)
    assert not ok
    assert_same(before, blocks)
    _, ok = steps.theta_step(blocks, gradients(blocks, 2), **options)  # and the next one goes on
    assert ok


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("normalize", ["rms", "trust", None])
@pytest.mark.parametrize("momentum", ["before", "after"])
def test_zero_gradient_moves_nothing_but_the_decay(momentum: str, normalize: str, capturable: bool) -> None:
    for decay in (0.0, 0.5):
        blocks = make_blocks(weight_decay=decay)
        before = [theta(b) for b in blocks]
        zeros = [torch.zeros_like(t) for t in before]
        _, ok = steps.theta_step(blocks, zeros, momentum=momentum, normalize=normalize, capturable=capturable)
        assert ok
        for b, old in zip(blocks, before, strict=True):
            assert relative(theta(b), old * (1 - 0.1 * decay)) <= 1e-15


# λ


def fisher_products(blocks: list[Block]) -> list[Tensor]:
    """A positive semi-definite F over all blocks together, coupling them: one dense matrix."""
    size = sum(math.prod(b.shape) for b in blocks)
    x = randn(size, size, seed=7, dtype=torch.float64)
    return x @ x.T / size


def split(vector: Tensor, blocks: list[Block]) -> list[Tensor]:
    pieces = vector.split([math.prod(b.shape) for b in blocks])
    return [p.reshape(b.shape) for p, b in zip(pieces, blocks, strict=True)]


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
        loss, ok = steps.lambda_step(blocks, split(u, blocks), vs, fv, **options, capturable=capturable)
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
    loss, _ = steps.lambda_step(blocks, split(u, blocks), vs, split(F @ v, blocks), **options)
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
    steps.lambda_step(blocks, split(u, blocks), vs, split(F @ v, blocks), damping=0.3, lr=0.01, precondition=True)
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
    loss, ok = steps.lambda_step(blocks, us, vs, fvs, damping=0.1, lr=0.1, capturable=capturable)
    assert not ok
    assert_same(before, blocks)
    if where == "zero":
        assert loss == 0


def test_ops_take_lists_of_blocks() -> None:
    blocks = make_blocks()
    us = gradients(blocks, 1)
    for b, u, got in zip(blocks, us, steps.qv(blocks, us), strict=True):
        want = dense_q(b.structure, b.structure.fishleg_aux) @ u.reshape(-1)
        assert relative(got.reshape(-1), want) <= 1e-12
    total = sum((u * u).sum() for u in us)
    assert relative(steps.inner(us, us), total) <= 1e-12
    blocks[0].structure.fishleg_aux["R"].mul_(2)
    steps.refresh(blocks)
    R = blocks[0].structure.fishleg_aux["R"]
    assert relative(blocks[0].structure.cache["P"], R.T @ R) <= 1e-12
