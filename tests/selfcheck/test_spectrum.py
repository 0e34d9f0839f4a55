"""Matrices whose polar factors stand rounding, and what of others it makes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fishleg_fast.algebra.polar import COEFFICIENTS
from fishleg_fast.selfcheck.spectrum import amplification, levels, two_levels


def polar(x: Tensor, rounding: float) -> Tensor:
    """By the polynomials, in float64, the operands of products off by so much of themselves."""
    generator = torch.Generator().manual_seed(0)
    off = lambda t: t * (1 + rounding * (2 * torch.rand(t.shape, generator=generator, dtype=t.dtype) - 1))
    x = x / torch.linalg.matrix_norm(x @ x.T @ x @ x.T).pow(0.25)
    for a, b, c in COEFFICIENTS:
        A = off(x) @ off(x).T
        A2 = off(A) @ off(A).T
        x = a * x + off(b * A + c * A2) @ off(x)
    return x


def error(x: Tensor, rounding: float) -> float:
    want = polar(x, 0.0)
    return float((polar(x, rounding) - want).norm() / want.norm())


@pytest.mark.parametrize("shape", [(33, 62), (25, 56), (64, 97), (257, 65)])
def test_two_levels_stand_rounding_better_than_what_is_drawn(shape: tuple[int, int]) -> None:
    x = two_levels(*shape).double()
    x = x if x.shape[0] <= x.shape[1] else x.T
    drawn = torch.randn(x.shape, dtype=torch.float64)
    assert error(x, 2**-11) < 0.05 and error(x, 2**-11) < 0.7 * error(drawn, 2**-11)


def test_two_levels_are_what_they_are_said_to_be() -> None:
    r, c = levels(33)
    values = torch.linalg.svdvals(two_levels(33, 62).double())
    assert torch.allclose(values, torch.tensor([1.0] * r + [c] * (33 - r), dtype=torch.float64), atol=1e-5)
    assert torch.equal(two_levels(33, 62), two_levels(33, 62)) and two_levels(1, 1).shape == (1, 1)


def test_a_value_that_comes_near_zero_amplifies_most() -> None:
    """The first polynomial has a zero near 0.84."""
    assert amplification((0.84,)) > 10 * amplification((0.6,))
