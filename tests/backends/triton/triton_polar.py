"""Polar factors by the Triton kernels, interpreted: test_triton.py runs this file with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fishleg_fast import Diagonal, Kron
from fishleg_fast.algebra.polar import polar_factors
from fishleg_fast.backends import reference as steps
from fishleg_fast.backends.protocol import ThetaOptions
from fishleg_fast.kernels import backend
from fishleg_fast.kernels.host.tables.strides import padded
from fishleg_fast.kernels.host.tables.workspace import PolarBuffers
from fishleg_fast.kernels.host.theta.polar import PolarFactors
from fishleg_fast.model.block import Block
from support.blocks import assert_same, everything, make_block, theta
from support.dense import randn, relative
from support.spectra import assert_flattened, with_condition
from support.triton_blocks import (
    CLOSE,
    NAN,
    Maker,
    all_blocks,
    backend_kind,
    kron_blocks,
    matrices,
    pair,
    tamed,
)

pytestmark = pytest.mark.usefixtures("interpreter_of_numpy_2_4", "poisoned")

POLAR_LAUNCHES = ["symmetric_kernel", "symmetric_kernel", "apply_kernel"] * 6
ROUNDING = 1e-3  # of float32, in directions whose singular value is small: it grows to some thousand times


def buffers(x: Tensor) -> PolarBuffers:
    """Ours for x (m, n), with x/‖x‖ and its transpose in them, and NaN where kernels have to write first."""
    (m, n), (short, long) = x.shape, sorted(x.shape)
    sizes = [(m, n), (n, m), (long, short), (short, short), (short, short)]
    found = PolarBuffers(*(torch.full((rows, padded(columns)), NAN) for rows, columns in sizes))
    unit = x / x.norm().clamp_min(1e-30)
    found.polar.zero_()[:, :n].copy_(unit), found.polar_t.zero_()[:, :m].copy_(unit.T)
    return found


def polar(xs: list[Tensor], precision: str = "ieee") -> list[Tensor]:
    factors, given = PolarFactors(torch.device("cpu"), precision), [buffers(x) for x in xs]
    for x, b in zip(xs, given, strict=True):
        factors.append(tuple(x.shape), b)
    for launch in factors.launches:
        launch()
    for x, b in zip(xs, given, strict=True):
        m, n = x.shape
        assert torch.equal(b.polar[:, :n], b.polar_t[:, :m].T)
        assert not b.polar[:, n:].any() and not b.polar_t[:, m:].any()
    return [b.polar[:, : x.shape[1]] for x, b in zip(xs, given, strict=True)]


def test_against_svd(launches: list[str]) -> None:
    """Wide, tall and square, condition numbers up to 1000, in the same 18 launches."""
    sizes = [(2, 2, 30), (17, 17, 1000), (33, 50, 1000), (67, 35, 30), (2, 70, 1000), (70, 3, 1)]
    xs = [with_condition(m, n, condition, seed=m + n).float() for m, n, condition in sizes]
    found = polar(xs)
    assert launches == POLAR_LAUNCHES
    for x, y, want in zip(xs, found, polar_factors([x.double() for x in xs]), strict=True):
        assert_flattened(x, y)
        assert relative(y, want) <= ROUNDING


def test_where_singular_values_are_zero() -> None:
    """Zeros stay zeros, a rank stays what it is; nothing is divided by zero."""
    xs = [torch.zeros(5, 8), torch.zeros(40, 3), 1e-12 * with_condition(9, 6, 3).float()]
    xs += [(randn(20, 2) @ randn(2, 35, seed=1)).float(), torch.ones(33, 5)]
    zero, other, tiny, low, ones = polar(xs)
    assert not zero.any() and not other.any()
    assert_flattened(xs[2], tiny)
    values = torch.linalg.svdvals(low.double())
    assert 0.9 <= values[1] and values[0] <= 1.1 and values[2] <= 1e-3
    assert relative(ones, torch.ones(33, 5) / 165**0.5) <= 0.1


def gradients(blocks: list[Block], seed: int) -> list[Tensor]:
    return [g.to(b.dtype) for b, g in zip(blocks, matrices(blocks, seed), strict=True)]


def mixed_blocks(dtype: torch.dtype = torch.float64, **group: object) -> list[Block]:
    """Those that keep their shape, by pattern or since they are vectors, between others; float64 ones too."""
    o, f = {"dtype": dtype}, {"dtype": dtype}
    makes = [
        make_block(Kron(18, 33, **o), [randn(18, 32, **f), randn(18, seed=1, **f)], seed=1, **group),
        make_block(Kron(7, 5, **o), [randn(7, 5, seed=2, **f)], seed=2, **group),
        make_block(Kron(1, 9, **o), [randn(1, 9, seed=3, **f)], seed=3, **group),
        make_block(Diagonal((9, 1), **o), [randn(5, seed=4, **f), randn(4, seed=5, **f)], 0, 4, **group),
        make_block(Diagonal((6, 8), **o), [randn(6, 8, seed=6, **f)], 1, 5, **group),
        make_block(Kron(9, 4, max_factor_size=4, **o), [randn(9, 4, seed=7, **f)], seed=6, **group),
        make_block(Kron(9, 4, dtype=torch.float64), [randn(9, 4, seed=8)], seed=7, **group),
        make_block(Kron(4, 6, max_factor_size=3, **o), [randn(4, 6, seed=9, **f)], seed=8, **group),
    ]
    makes[1].spectral = makes[7].spectral = False
    return [tamed(b) for b in makes]


@pytest.mark.parametrize(
    ("make", "momentum", "nesterov", "capturable", "count"),
    [
        (kron_blocks, "before", True, False, 3),
        (all_blocks, "after", True, True, 6),
        (mixed_blocks, "before", False, True, 4),
        (mixed_blocks, "after", False, False, 4),
    ],
)
def test_theta_step(
    make: Maker, momentum: str, nesterov: bool, capturable: bool, count: int, launches: list[str]
) -> None:
    """Two steps against float64: launches of the step itself, and 19."""
    exact, ours = pair(make, weight_decay=0.1, beta=0.8, lr=0.05)
    options = ThetaOptions(momentum=momentum, normalize="spectral", nesterov=nesterov, capturable=capturable)
    before = [theta(b).double() for b in exact]
    for step in (1, 2):
        launches.clear()
        gs = gradients(ours, step)
        want, _ = steps.theta_step(exact, [g.double() for g in gs], options)
        norms, ok = backend.theta_step(ours, gs, options)
        assert ok and relative(norms, want) <= CLOSE
    assert len(launches) == count + 19 and launches[-20:] == ["unit_kernel", *POLAR_LAUNCHES, "update_kernel"]
    for a, b, old in zip(exact, ours, before, strict=True):
        close = ROUNDING if b.flattened else CLOSE
        assert relative(theta(b).double() - old, theta(a) - old) <= close, b.shape
        assert relative(b.momentum, a.momentum) <= CLOSE and b.step == 2


def test_launches_do_not_depend_on_the_number_of_blocks(launches: list[str]) -> None:
    for count in (1, 5):
        shapes = [(2 + k, 3) for k in range(count)]
        blocks = [tamed(make_block(Kron(*shape, dtype=torch.float32), [randn(*shape).float()])) for shape in shapes]
        backend.refresh(blocks)
        launches.clear()
        backend.theta_step(blocks, matrices(blocks, 1), ThetaOptions(normalize="spectral"))
        assert len(launches) == 3 + 19


@pytest.mark.parametrize("momentum", ["before", "after"])
def test_what_is_not_finite_writes_nothing_and_is_forgotten(momentum: str) -> None:
    _, blocks = pair(mixed_blocks)
    options = ThetaOptions(normalize="spectral", momentum=momentum)
    backend.theta_step(blocks, gradients(blocks, 1), options)
    before, gs = everything(blocks), gradients(blocks, 2)
    for index in (0, 4, 5):  # Kron's kernels, Diagonal's, and the reference's block
        gs[index][0, 0] = NAN
    assert not backend.theta_step(blocks, gs, options)[1]
    assert_same(before, blocks)
    assert backend.theta_step(blocks, gradients(blocks, 3), options)[1]
    assert all(torch.isfinite(t).all() for t in everything(blocks))


def test_gradients_of_zeros_move_nothing() -> None:
    _, blocks = pair(mixed_blocks)
    before = [theta(b) for b in blocks]
    for step in (0, 1, 0):  # nothing is known of any direction; then m is not zero, but g is
        gs = [step * g for g in gradients(blocks, 1)]
        assert backend.theta_step(blocks, gs, ThetaOptions(normalize="spectral"))[1]
        moved = [not torch.equal(theta(b), old) for b, old in zip(blocks, before, strict=True)]
        assert all(moved) if step else not any(moved)
        before = [theta(b) for b in blocks]


def test_the_plan_follows_what_is_chosen(launches: list[str]) -> None:
    """Blocks that become "rms", and a plan that is used again."""
    exact, ours = pair(lambda dtype, **o: kron_blocks(dtype, **o)[::3])
    for step in range(3):
        for b in (exact[0], ours[0]):
            b.spectral = step < 2
        gs = matrices(ours, step)
        steps.theta_step(exact, [g.double() for g in gs], ThetaOptions(normalize="spectral"))
        backend.theta_step(ours, gs, ThetaOptions(normalize="spectral"))
    for a, b in zip(exact, ours, strict=True):
        assert backend_kind(b) == "kron" and relative(theta(b), theta(a)) <= ROUNDING
