"""Polar factors by packed products (fishleg_fast/backends/cpu/polar.py) against SVDs and the polynomials in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fishleg_fast import native
from fishleg_fast.algebra.polar import COEFFICIENTS
from fishleg_fast.algebra.polar import polar_factors as exact_polynomials
from fishleg_fast.algebra.structures.kron import Kron
from fishleg_fast.backends.cpu.packed_matrix import LEFT, RIGHT, engines
from fishleg_fast.backends.cpu.polar import polar_factors
from fishleg_fast.backends.cpu.state import polar_scratch
from fishleg_fast.model.block import Block
from support.blocks import make_block
from support.dense import randn, relative
from support.spectra import assert_flattened, with_condition

pytestmark = pytest.mark.skipif("avx512" not in engines(), reason="this processor, or this build, has no AVX-512")

# Of A = X Xᵀ alone where one side is at least twice the other, on either side; X itself at each step otherwise.
SHAPES = [(1, 1), (1, 9), (9, 1), (33, 257), (130, 64), (128, 300), (32, 63), (65, 65), (96, 200)]
SHAPES += [(300, 900)]  # more than one thread keeps in its cache


def blocks_of(shapes: list[tuple[int, int]], operands: torch.dtype = torch.float32) -> list[Block]:
    """Blocks whose scratch memory is NaN."""
    made = []
    for m, n in shapes:
        block = make_block(Kron(m, n, dtype=torch.float32), [torch.zeros(m, n)])
        block.structure.operand_dtype = operands
        operator, k, l = polar_scratch(block), min(m, n), max(m, n)
        for name, side, size in [
            *((name, side, (k, k)) for name in ("A", "B") for side in (LEFT, RIGHT)),
            ("X", LEFT, (k, l)), ("X", RIGHT, (l, k)), ("Y", LEFT, (l, k)), ("Y", RIGHT, (k, l)),
        ]:  # fmt: skip
            operator.scratch(name, side, *size).memory.fill_(0xFF)
        made.append(block)
    return made


def factors(xs: list[Tensor], operands: torch.dtype = torch.float32) -> list[Tensor]:
    ys = [x.float().clone(memory_format=torch.contiguous_format) for x in xs]
    polar_factors(blocks_of([(x.shape[0], x.shape[1]) for x in xs], operands), ys)
    return ys


@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3])
def test_float32(condition: float) -> None:
    xs = [with_condition(m, n, condition, seed=k) * 10.0 ** (k - 4) for k, (m, n) in enumerate(SHAPES)]
    for x, y, want in zip(xs, factors(xs), exact_polynomials(xs), strict=True):
        assert_flattened(x, y)
        assert relative(y.double(), want) <= 1e-3  # float32 keeps so much of small singular values


def test_low_rank_and_zeros() -> None:
    low = [randn(m, 2, seed=1) @ randn(2, n, seed=2) for m, n in [(33, 257), (257, 33), (40, 41)]]
    for x, y in zip(low, factors(low), strict=True):
        U, _, Vh = torch.linalg.svd(x, full_matrices=False)
        assert relative(y.double(), U[:, :2] @ Vh[:2]) <= 0.09
        assert torch.linalg.svdvals(y.double())[2] <= 5e-3  # rounding, grown by the polynomials
    assert all(y.count_nonzero() == 0 for y in factors([torch.zeros(30, 70), torch.zeros(5, 5)]))


@pytest.mark.skipif("amx" not in engines(), reason="this processor, or this build, has no AMX")
def test_bfloat16() -> None:
    """Near the polar factor, but for the few directions that the first polynomial brings so near zero that rounding
    decides of them.
    """
    xs = [randn(m, n, seed=k) for k, (m, n) in enumerate([(33, 257), (300, 128), (96, 200)])]
    for x, y in zip(xs, factors(xs, torch.bfloat16), strict=True):
        U, _, Vh = torch.linalg.svd(x, full_matrices=False)
        assert relative(y.double(), U @ Vh) <= 0.15
        values = torch.linalg.svdvals(y.double())
        assert values[0] <= 1.2 and values.quantile(0.1) >= 0.7


def test_what_is_not_finite_shows() -> None:
    x = randn(20, 60)
    x[3, 4] = float("nan")
    y, other = factors([x, randn(20, 60, seed=1)])
    assert not torch.isfinite(y).all() and torch.isfinite(other).all()
    (again,) = factors([randn(20, 60, seed=1)])  # in memory that has been NaN
    assert torch.equal(again, other)


def test_any_number_of_threads() -> None:
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(factors([randn(m, n, seed=m) for m, n in SHAPES]))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_refusals() -> None:
    extension = native.extension()
    with pytest.raises(ValueError, match="m and n should be at least 0 but is: -1"):
        extension.polar_factors("avx512", [(0, -1, 3, 1)], COEFFICIENTS, 1)
    with pytest.raises(ValueError, match="the steps to a product should be at least 1 but is: 0"):
        extension.polar_factors("avx512", [(0, 3, 3, 0)], COEFFICIENTS, 1)
