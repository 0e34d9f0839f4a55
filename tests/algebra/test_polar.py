"""Polar factors against singular value decompositions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fishleg_fast.algebra.polar import SMALLEST, polar_factors
from support.dense import randn, relative

SHAPES = [(1, 1), (1, 7), (5, 5), (33, 20), (20, 33), (64, 257)]


def with_spectrum(shape: tuple[int, int], singular: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A float64 matrix with these singular values, and its polar factor."""
    m, n = shape
    U, _ = torch.linalg.qr(randn(m, len(singular), seed=seed))
    V, _ = torch.linalg.qr(randn(n, len(singular), seed=seed + 1))
    return (U * singular) @ V.T, U @ V.T


def spectra(k: int, condition: float) -> dict[str, Tensor]:
    ones = torch.ones(k, dtype=torch.float64)
    small = ones / condition
    return {
        "geometric": torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), k, dtype=torch.float64),
        "half": torch.cat([ones[: k - k // 2], small[: k // 2]]),
        "one large": torch.cat([ones[:1], small[1:]]),
        "one small": torch.cat([ones[1:], small[:1]]),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize("exact", [False, True])
def test_singular_values_come_near_one(
    exact: bool, size: float, shape: tuple[int, int], condition: float, dtype: torch.dtype
) -> None:
    for name, singular in spectra(min(shape), condition).items():
        x, want = with_spectrum(shape, singular)
        (got,) = polar_factors([(size * x).to(dtype)], exact)
        values = torch.linalg.svdvals(got.double())
        assert 0.9 <= values.min() and values.max() <= 1.1, (name, values.min(), values.max())
        assert relative(got.double(), want) <= 0.09
        overlap = torch.sum(got.double() * want) / (got.double().norm() * want.norm())
        assert overlap >= 0.99  # of directions


@pytest.mark.parametrize("exact", [False, True])
def test_what_is_small_stays_below_one_and_keeps_its_sign(exact: bool) -> None:
    """Singular values below the smallest grow, but not past 1.1: they are noise, or on their way down."""
    singular = torch.logspace(0, -8, 40, dtype=torch.float64)
    x, _ = with_spectrum((40, 90), singular)
    U, s, Vh = torch.linalg.svd(x, full_matrices=False)
    (got,) = polar_factors([x], exact)
    moved = torch.diagonal(U.T @ got @ Vh.T)
    assert (moved > 0).all() and (moved <= 1.1).all() and (moved[s < SMALLEST] > s[s < SMALLEST]).all()


@pytest.mark.parametrize("exact", [False, True])
def test_a_matrix_of_low_rank_keeps_its_null_space(exact: bool) -> None:
    x, want = with_spectrum((30, 70), torch.tensor([3.0, 2.0, 0.1], dtype=torch.float64))
    (got,) = polar_factors([x], exact)
    values = torch.linalg.svdvals(got)
    assert relative(got, want) <= 0.09 and values[3:].max() <= 1e-9


def test_zeros_stay_zeros_and_nothing_given_is_written_to() -> None:
    xs = [torch.zeros(4, 6), randn(6, 4).float(), randn(4, 6, seed=1).float(), torch.zeros(0, 3), randn(3, 3)]
    before = [x.clone() for x in xs]
    found = polar_factors(xs)
    assert [f.shape for f in found] == [x.shape for x in xs] and [f.dtype for f in found] == [x.dtype for x in xs]
    assert torch.equal(found[0], xs[0]) and all(map(torch.equal, xs, before))
    alone = [polar_factors([x])[0] for x in xs]
    assert all(relative(a, b) <= 1e-5 for a, b in zip(found[1:], alone[1:], strict=True) if a.numel())


@pytest.mark.parametrize("shape", [(30, 60), (64, 257), (257, 64), (20, 21)])
def test_steps_on_the_gram_matrix_are_the_same_steps(shape: tuple[int, int]) -> None:
    for singular in spectra(min(shape), 1e3).values():
        x, _ = with_spectrum(shape, singular)
        (one,), (other,) = polar_factors([x]), polar_factors([x], exact=True)
        assert relative(other, one) <= 1e-10


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad: float) -> None:
    x = randn(5, 4)
    x[2, 1] = bad
    assert not torch.isfinite(polar_factors([x])[0]).all()
