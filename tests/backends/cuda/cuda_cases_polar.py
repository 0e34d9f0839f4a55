"""normalize="spectral" by the CUDA backend, for test_cuda_steps.py (on the CPU) and test_cuda_device.py."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cuda_cases import trajectory
from fishleg_fast.algebra.structures.diagonal import Diagonal
from fishleg_fast.algebra.structures.kron import Kron
from fishleg_fast.backends import cuda, reference
from fishleg_fast.backends.protocol import ThetaOptions
from fishleg_fast.model.block import Block
from support.blocks import everything, make_block
from support.cuda_blocks import layer, model, set_gradients
from support.dense import randn, relative
from support.spectra import assert_flattened, with_condition

SPECTRAL = {"normalize": "spectral"}


def polar(device: torch.device, xs: Sequence[Tensor], precision: str = "ieee") -> list[Tensor]:
    """What a step from zero along x with Q = I moves, in its own unit: the polar factor."""
    blocks = []
    for x in xs:
        structure = Kron(*x.shape, dtype=torch.float32, device=device)
        structure.precision = precision
        block = make_block(structure, [torch.zeros(x.shape, device=device)], lr=1.0, beta=0.0)
        for name, size in zip("RL", x.shape, strict=True):
            structure.fishleg_aux[name].copy_(torch.eye(size))
        blocks.append(block)
    _, ok = cuda.theta_step(blocks, [x.float().to(device) for x in xs], ThetaOptions(**SPECTRAL))
    assert ok
    return [-b.parts[0].param.detach().cpu() / (0.2 * max(b.shape) ** 0.5) for b in blocks]


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_polar_factors_against_svd(device: torch.device, precision: str) -> None:
    sizes = [(2, 2, 30), (17, 17, 1000), (33, 70, 1000), (67, 35, 30), (2, 70, 1000), (70, 3, 1), (64, 64, 100)]
    xs = [with_condition(m, n, condition, seed=m + n) for m, n, condition in sizes]
    for x, y in zip(xs, polar(device, xs, precision), strict=True):
        assert_flattened(x, y)


def test_polar_factors_where_singular_values_are_zero(device: torch.device) -> None:
    low = randn(20, 2) @ randn(2, 35, seed=1)
    zero, other, tiny, low, ones = polar(
        device, [torch.zeros(5, 8), torch.zeros(70, 3), 1e-12 * with_condition(9, 6, 3), low, torch.ones(33, 5)]
    )
    assert not zero.any() and not other.any()
    assert_flattened(with_condition(9, 6, 3), tiny)
    values = torch.linalg.svdvals(low.double())
    assert 0.9 <= values[1] and values[0] <= 1.1 and values[2] <= 1e-3
    assert relative(ones, torch.ones(33, 5) / 165**0.5) <= 0.1


def mixed(device: torch.device) -> list[Block]:
    """Blocks that keep their shape between others, of all kinds, of float64 too."""
    blocks = model(device, lr=0.05, weight_decay=0.1)
    blocks.append(make_block(Kron(3, 4, dtype=torch.float64, device=device), [randn(3, 4).to(device)], seed=3))
    for k in (2, 7, 10):
        blocks[k].spectral = False
    return blocks


@pytest.mark.parametrize("momentum", ["before", "after"])
def test_blocks_that_are_not_for_it_are_rms(device: torch.device, momentum: str) -> None:
    ours, theirs = mixed(device), mixed(device)
    start = everything(ours)
    for step in (1, 2):
        for op, blocks in ((cuda, ours), (reference, theirs)):
            assert op.theta_step(blocks, set_gradients(blocks, step), ThetaOptions(momentum=momentum, **SPECTRAL))[1]
    for a, b, old in zip(everything(ours), everything(theirs), start, strict=True):
        assert relative(a - old, b - old) <= 1e-3


def test_what_is_not_finite_writes_nothing_and_is_forgotten(device: torch.device) -> None:
    blocks = mixed(device)
    cuda.theta_step(blocks, set_gradients(blocks, 1), ThetaOptions(**SPECTRAL))
    before, gs = everything(blocks), set_gradients(blocks, 2)
    for k in (0, 3, 9, 12):  # a vector, Kron's kernels, Diagonal's, uncovered
        blocks[k].grads[0].view(-1)[-1] = float("nan")
    assert not cuda.theta_step(blocks, gs, ThetaOptions(**SPECTRAL))[1]
    assert all(map(torch.equal, before, everything(blocks)))
    assert cuda.theta_step(blocks, set_gradients(blocks, 3), ThetaOptions(**SPECTRAL))[1]
    assert all(torch.isfinite(t).all() for t in everything(blocks))


def test_polar_steps_with_gradients_of_zeros_move_nothing(device: torch.device) -> None:
    blocks = [layer(device, 6, 9), layer(device, 70, 5, seed=1), layer(device, 1, 4, seed=2)]
    blocks.append(make_block(Diagonal((6, 8), dtype=torch.float32, device=device), [randn(6, 8).float().to(device)]))
    for step in (0, 1, 0):
        before = [p.param.clone() for b in blocks for p in b.parts]
        gs = set_gradients(blocks, 1)
        for b in blocks:
            for g in b.grads:
                g.mul_(step)
        assert cuda.theta_step(blocks, gs, ThetaOptions(**SPECTRAL))[1]
        same = list(map(torch.equal, before, [p.param for b in blocks for p in b.parts]))
        assert not any(same) if step else all(same)


@pytest.mark.parametrize(("normalize", "close"), [("rms", 1e-4), ("spectral", 2e-2)])
def test_relative_damping_follows_the_reference(device: torch.device, normalize: str, close: float) -> None:
    """Softmax's gradients lack a direction, where a polar factor is grown rounding, of any backend."""
    options = {"damping": 0.3, "damping_scale": "relative", "normalize": normalize, "thin_gradients": False}
    ours = trajectory(device, 9, lambda: cuda, **options)
    theirs = trajectory(device, 9, lambda: reference, **options)
    absolute = trajectory(device, 9, lambda: reference, **{**options, "damping_scale": "absolute"})
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert relative(a, b) <= close, k
    assert relative(absolute[0], theirs[0]) > 2e-2
