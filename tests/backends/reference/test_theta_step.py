"""The θ step of every backend for CPUs against loops over scalars."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fishleg_fast.algebra.structures.kron import Kron
from fishleg_fast.backends import reference as steps  # or the ops of another backend, by each_backend
from fishleg_fast.backends.protocol import ThetaOptions
from fishleg_fast.model.block import Block, Part
from support.blocks import assert_same, everything, gradients, make_block, make_blocks, theta
from support.dense import dense_q, randn, relative

pytestmark = pytest.mark.usefixtures("each_backend", "no_grad")

EXACT = {False: 1e-11, True: 1e-6}  # by capturable: the count of steps is then a float32 tensor, and so are powers of β


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
        norms, ok = steps.theta_step(blocks, gradients(blocks, step), ThetaOptions(**options, capturable=capturable))
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
        steps.theta_step(blocks, gs, ThetaOptions(normalize="trust", kappa=kappa))
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
        norms, _ = steps.theta_step(blocks, gs, ThetaOptions())
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
        steps.theta_step([block], gradients([block], step), ThetaOptions())
    assert block.parts[0].param.dtype == dtype and block.momentum.dtype == torch.float32
    assert relative(theta(block), want) <= 4 * torch.finfo(dtype).eps


def test_missing_gradients_keep_their_parameters() -> None:
    """A part without a gradient does not move, by decay neither; the others move as if its gradient were zero."""
    block, twin = make_blocks(weight_decay=0.5)[0], make_blocks(weight_decay=0.5)[0]
    bias = block.parts[1].param.detach().clone()
    g = randn(3, 5, seed=9)
    g[:, -1] = 0
    block.grads = [block.grads[0], None]
    steps.theta_step([block], [g], ThetaOptions())
    steps.theta_step([twin], [g], ThetaOptions())
    assert torch.equal(block.parts[1].param, bias)
    assert torch.equal(block.parts[0].param, twin.parts[0].param)
    assert not torch.equal(twin.parts[1].param, bias)


def test_each_part_follows_its_own_group() -> None:
    block, plain = make_blocks()[0], make_blocks()[0]
    block.groups = [block.groups[0], {**block.groups[0], "lr": 0.2, "weight_decay": 0.5}]
    bias, old = block.parts[1].param.detach().clone(), plain.parts[1].param.detach().clone()
    g = randn(3, 5, seed=9)
    steps.theta_step([block], [g], ThetaOptions())
    steps.theta_step([plain], [g], ThetaOptions())
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
        steps.theta_step(blocks, gs, ThetaOptions(normalize=None, capturable=capturable))
        want = torch.cat([(Q @ g.reshape(-1)).reshape(3, 3) for Q, g in zip(Qs, gs, strict=True)])
        assert relative(old - p.detach(), 0.1 * want) <= 1e-6  # lr is a float32 tensor


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("normalize", ["rms", "trust", None])
@pytest.mark.parametrize("momentum", ["before", "after"])
def test_a_gradient_that_is_not_finite_writes_nothing(momentum, normalize, bad: float, capturable: bool) -> None:
    blocks = make_blocks(weight_decay=0.1)
    options = {"momentum": momentum, "normalize": normalize, "capturable": capturable}
    steps.theta_step(blocks, gradients(blocks, 1), ThetaOptions(**options))
    before, gs = everything(blocks), gradients(blocks, 2)
    gs[1][0, 0] = bad
    _, ok = steps.theta_step(blocks, gs, ThetaOptions(**options))
    assert not ok
    assert_same(before, blocks)
    _, ok = steps.theta_step(blocks, gradients(blocks, 2), ThetaOptions(**options))  # and the next one goes on
    assert ok


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("normalize", ["rms", "trust", None])
@pytest.mark.parametrize("momentum", ["before", "after"])
def test_zero_gradient_moves_nothing_but_the_decay(momentum: str, normalize: str, capturable: bool) -> None:
    for decay in (0.0, 0.5):
        blocks = make_blocks(weight_decay=decay)
        before = [theta(b) for b in blocks]
        zeros = [torch.zeros_like(t) for t in before]
        _, ok = steps.theta_step(
            blocks, zeros, ThetaOptions(momentum=momentum, normalize=normalize, capturable=capturable)
        )
        assert ok
        for b, old in zip(blocks, before, strict=True):
            assert relative(theta(b), old * (1 - 0.1 * decay)) <= 1e-15
