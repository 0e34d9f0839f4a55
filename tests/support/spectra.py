"""Matrices of given singular values, and what is expected of their polar factors."""

from __future__ import annotations

import torch
from torch import Tensor

from support.dense import randn


def with_condition(m: int, n: int, condition: float, seed: int = 0) -> Tensor:
    """(m, n) in float64, whose singular values go from 1 down to 1/condition in equal ratios."""
    k = min(m, n)
    U = torch.linalg.qr(randn(m, k, seed=seed))[0]
    V = torch.linalg.qr(randn(n, k, seed=seed + 1))[0]
    return (U * torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), k, dtype=torch.float64)) @ V.T


def assert_flattened(x: Tensor, y: Tensor) -> None:
    """y has x's singular vectors, with values near 1: it is U diag(values) Vᵀ."""
    U, _, Vh = torch.linalg.svd(x.double(), full_matrices=False)
    values = torch.linalg.svdvals(y.double())
    assert 0.7 <= values.min() and values.max() <= 1.2, (values.min(), values.max())
    between = U.T @ y.double() @ Vh.T
    assert (between - torch.diag(between.diagonal())).norm() <= 1e-2 * len(between) ** 0.5
    assert (y.double() - U @ Vh).norm() <= 0.2 * len(between) ** 0.5
