"""Matrices on which polar factors can be told right from wrong whatever products are rounded to.

The polynomials of ``algebra.polar`` bring some singular values near to zero on their way and up again, and with them
rounding errors as large as the matrix: of most matrices some direction ends anywhere at TF32, of any implementation. Of
a matrix with two different singular values these can be chosen so that neither comes near.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..algebra.polar import COEFFICIENTS


def amplification(values: tuple[float, ...]) -> float:
    """What becomes of errors in the polar factor that each step adds, in units of rounding: those of its terms, of the
    largest singular value. ``values``: after the first normalisation.
    """
    ways = [values]
    for a, b, c in COEFFICIENTS:
        ways.append(tuple(a * x + b * x**3 + c * x**5 for x in ways[-1]))
    errors = []
    for (a, b, c), way in zip(COEFFICIENTS, ways, strict=False):
        x = max(map(abs, way))
        errors.append(abs(a) * x + abs(b) * x**3 + abs(c) * x**5)
    worst = 0.0
    for k in range(len(values)):
        slope, total = 1.0, 0.0
        for step in reversed(range(len(COEFFICIENTS))):
            (a, b, c), x = COEFFICIENTS[step], ways[step][k]
            turned = abs(ways[-1][k] / ways[step + 1][k])  # of singular vectors, by which an error is turned
            total += max(slope, turned) * errors[step]
            slope *= abs(a + 3 * b * x**2 + 5 * c * x**4)
        worst = max(worst, total / abs(ways[-1][k]))
    return worst


@cache
def levels(k: int) -> tuple[int, float]:
    """(r, c): r of k singular values 1 and the others c, with which rounding is amplified least."""
    found = {}
    for r in sorted({max(1, k * i // 16) for i in range(1, 17)}):
        for c in (i / 100 for i in range(20, 100)):
            size = (r + (k - r) * c**8) ** 0.125  # what the first step divides by
            found[r, c] = amplification((1 / size, c / size) if r < k else (1 / size,))
    return min(found, key=lambda rc: found[rc])


def two_levels(m: int, n: int) -> Tensor:
    """(m, n) with singular values 1 and c, in float32, on the CPU; the same whenever it is made."""
    k, generator = min(m, n), torch.Generator("cpu").manual_seed(m * 10_007 + n)
    sides = [torch.randn(size, k, generator=generator, device="cpu") for size in (m, n)]
    U, V = (torch.linalg.qr(x)[0] for x in sides)
    r, c = levels(k)
    values = torch.where(torch.arange(k, device="cpu") < r, 1.0, c)
    return (U * values) @ V.T
