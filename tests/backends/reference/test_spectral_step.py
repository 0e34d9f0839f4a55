"""The θ step with normalize="spectral", of every backend for CPUs, against SVDs in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fishleg_fast.algebra.low_rank import LowRank
from fishleg_fast.algebra.polar import COEFFICIENTS
from fishleg_fast.algebra.structures.diagkron import DiagKron
from fishleg_fast.algebra.structures.diagonal import Diagonal
from fishleg_fast.algebra.structures.kron import Kron
from fishleg_fast.algebra.structures.sumkron import SumKron
from fishleg_fast.backends import reference as steps  # or the ops of another backend, by each_backend
from fishleg_fast.backends.protocol import ThetaOptions
from fishleg_fast.model.block import Block
from support.blocks import assert_same, everything, gradients, make_block, theta
from support.dense import dense_q, randn, relative

pytestmark = pytest.mark.usefixtures("each_backend", "no_grad")


def flattened(nat: Tensor) -> Tensor:
    """The polynomials of ``algebra.polar`` on the singular values of nat; of a vector, the vector at length 1."""
    if min(nat.shape) == 1:
        return nat / nat.norm() if nat.norm() > 0 else nat
    U, s, Vh = torch.linalg.svd(nat.double(), full_matrices=False)
    s = s / s.pow(8).sum() ** 0.125 if s.sum() > 0 else s
    for a, b, c in COEFFICIENTS:
        s = a * s + b * s**3 + c * s**5
    return (U * s) @ Vh


def blocks_of_all_kinds(dtype: torch.dtype = torch.float64, **group: object) -> list[Block]:
    def weight(*shape: int, seed: int) -> list[Tensor]:
        return [randn(*shape, seed=seed, dtype=dtype), randn(shape[0], seed=seed + 1, dtype=dtype)]

    options = {"dtype": dtype}
    return [
        make_block(Kron(7, 5, **options), weight(7, 4, seed=0), **group),
        make_block(Kron(5, 8, **options), weight(5, 7, seed=2), seed=1, **group),
        make_block(Kron(6, 6, scale=True, **options), weight(6, 5, seed=4), seed=2, **group),
        make_block(Kron(9, 4, diagonal=("R",), **options), [randn(9, 4, seed=6, dtype=dtype)], seed=3, **group),
        make_block(Kron(9, 4, max_factor_size=4, **options), [randn(9, 4, seed=7, dtype=dtype)], seed=4, **group),
        make_block(DiagKron(3, 5, **options), weight(3, 4, seed=8), seed=5, **group),
        make_block(SumKron(4, 3, **options), weight(4, 2, seed=10), seed=6, **group),
        make_block(Diagonal((4, 6), **options), [randn(4, 6, seed=12, dtype=dtype)], seed=7, **group),
        make_block(Kron(1, 5, **options), weight(1, 4, seed=13), seed=8, **group),
        make_block(Diagonal((8, 1), **options), weight(4, 1, seed=15), axis=0, seed=9, **group),
    ]


def exact_steps(blocks: Sequence[Block], count: int, momentum: str, nesterov: bool) -> list[Tensor]:
    Qs = [dense_q(b.structure, b.structure.fishleg_aux).double() for b in blocks]
    thetas, averages = [theta(b).double() for b in blocks], [torch.zeros(b.shape).double() for b in blocks]
    for step in range(1, count + 1):
        for k, (b, g) in enumerate(zip(blocks, gradients(list(blocks), step), strict=True)):
            Q = lambda u, k=k, b=b: (Qs[k] @ u.reshape(-1)).reshape(b.shape)
            x = g.double() if momentum == "before" else Q(g.double())
            beta, group = b.beta, b.groups[0]
            averages[k] = beta * averages[k] + (1 - beta) * x
            ahead = beta * averages[k] + (1 - beta) * x if nesterov else averages[k]
            nat = Q(ahead) if momentum == "before" else ahead
            update = 0.2 * max(b.shape) ** 0.5 * flattened(nat)
            thetas[k] = thetas[k] - group["lr"] * (update + group["weight_decay"] * thetas[k])
    return thetas


@pytest.mark.parametrize("momentum", ["before", "after"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_steps(dtype: torch.dtype, nesterov: bool, momentum: str) -> None:
    blocks = blocks_of_all_kinds(dtype, lr=0.05, weight_decay=0.3)
    before, want = [theta(b).double() for b in blocks], exact_steps(blocks, 3, momentum, nesterov)
    for step in (1, 2, 3):
        options = ThetaOptions(momentum=momentum, nesterov=nesterov, normalize="spectral")
        norms, ok = steps.theta_step(blocks, gradients(blocks, step), options)
        assert ok
    for b, w, old in zip(blocks, want, before, strict=True):
        assert relative(theta(b).double() - old, w - old) <= (1e-9 if dtype == torch.float64 else 1e-3)
    plain = blocks_of_all_kinds(dtype)
    for step in (1, 2, 3):
        options = ThetaOptions(momentum=momentum, nesterov=nesterov, normalize=None)
        lengths, _ = steps.theta_step(plain, gradients(plain, step), options)
    assert relative(norms.double(), lengths.double()) <= 1e-5  # ‖nat‖ before it is flattened


@pytest.mark.parametrize("momentum", ["before", "after"])
def test_blocks_that_are_not_for_it_are_rms(momentum: str) -> None:
    mixed, flat, plain = (blocks_of_all_kinds() for _ in range(3))
    for b in mixed[::2]:
        b.spectral = False
    for step in (1, 2, 3):
        for blocks, normalize in ((mixed, "spectral"), (flat, "spectral"), (plain, "rms")):
            assert steps.theta_step(
                blocks, gradients(blocks, step), ThetaOptions(momentum=momentum, normalize=normalize)
            )[1]
    for k, (m, f, p) in enumerate(zip(mixed, flat, plain, strict=True)):
        assert relative(theta(m), theta(f if k % 2 else p)) <= 1e-9


@pytest.mark.parametrize("momentum", ["before", "after"])
def test_capturable_is_the_same(momentum: str) -> None:
    pair = []
    for capturable in (False, True):
        blocks = blocks_of_all_kinds()
        for step in (1, 2):
            options = ThetaOptions(momentum=momentum, normalize="spectral", capturable=capturable)
            steps.theta_step(blocks, gradients(blocks, step), options)
        pair.append([theta(b) for b in blocks])
    assert all(relative(a, b) <= 1e-6 for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_low_rank_gradients(dtype: torch.dtype) -> None:
    """Of a rank below the block's: the update has that rank, and moves it as far as "rms" would per direction."""
    options = ThetaOptions(normalize="spectral")
    low, whole = (make_block(Kron(9, 8, dtype=dtype), [torch.zeros(9, 8, dtype=dtype)]) for _ in range(2))
    g = LowRank(randn(3, 9, dtype=dtype), randn(3, 8, seed=1, dtype=dtype))
    for b in (low, whole):
        b.grads = [g.dense]
    steps.theta_step([low], [g], options)
    steps.theta_step([whole], [g.dense], options)
    close = 1e-9 if dtype == torch.float64 else 1e-3  # rounding in the other directions grows to some thousand times
    assert relative(theta(low), theta(whole)) <= close
    values = torch.linalg.svdvals(theta(low).double()) / (0.1 * 0.2 * 3)
    assert 0.9 <= values[2] and values[0] <= 1.1 and values[3] <= close


def test_a_gradient_of_zeros_moves_nothing_and_fades() -> None:
    blocks = blocks_of_all_kinds()
    options = ThetaOptions(normalize="spectral")
    steps.theta_step(blocks, gradients(blocks, 1), options)
    before, momenta = [theta(b) for b in blocks], [b.momentum.clone() for b in blocks]
    _, ok = steps.theta_step(blocks, [torch.zeros(b.shape, dtype=b.dtype) for b in blocks], options)
    assert ok and all(map(torch.equal, before, map(theta, blocks)))
    assert all(relative(b.momentum, 0.9 * m) <= 1e-12 for b, m in zip(blocks, momenta, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 3, 7, 9])
def test_what_is_not_finite_writes_nothing(which: int, bad: float) -> None:
    blocks = blocks_of_all_kinds()
    options = ThetaOptions(normalize="spectral")
    steps.theta_step(blocks, gradients(blocks, 1), options)
    before, gs = everything(blocks), gradients(blocks, 2)
    gs[which].view(-1)[-1] = bad
    assert not steps.theta_step(blocks, gs, options)[1]
    assert_same(before, blocks)
    assert steps.theta_step(blocks, gradients(blocks, 3), options)[1]
