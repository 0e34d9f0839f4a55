"""Medians and ratios of times over rounds, and how they read in a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

Rounds = list[dict[str, float]]  # the figures of each round


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Median and quartiles; None where there is nothing."""
    known = torch.tensor([v for v in values if not math.isnan(v)], dtype=torch.float64)
    if not len(known):
        return None
    low, middle, high = known.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def ratios(above: Rounds, below: Rounds, figure: str) -> dict[str, float] | None:
    """One contestant's figure over another's, round by round."""
    return spread(a[figure] / b[figure] for a, b in zip(above, below, strict=True))


def exponent(widths: Sequence[float], times: Sequence[float]) -> float:
    """k of time ∝ widthᵏ, by least squares of the logarithms."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (widths, times))
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())


def cell(value: dict[str, float] | None, unit: str = "", quartiles: bool = False) -> str:
    """Three digits of the median, and the quartiles where wanted."""
    if value is None:
        return ""
    three = lambda x: f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"
    text = three(value["median"]) + unit
    return text + (f" ({three(value['low'])} to {three(value['high'])})" if quartiles else "")
