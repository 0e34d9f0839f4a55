"""Plots of losses. matplotlib is imported late, so that nothing else needs it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

from benchmarks.common.optimizers import OPTIMIZERS

_NAMED = ("black", "navy", "darkgreen", "maroon", "goldenrod", "teal", "indigo", "salmon", "olive", "deepskyblue")
COLOURS = dict(zip(OPTIMIZERS, cycle([*(f"C{i}" for i in range(10)), *_NAMED]), strict=False))


def pyplot() -> Any:
    """matplotlib without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def loss_axis(axes: Any) -> None:
    """A logarithmic axis with numbers that read as losses: 60, not 6×10¹."""
    from matplotlib.ticker import LogFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter(labelOnlyBase=False))
    axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.7)))
    axes.grid(alpha=0.3, which="both")


def smooth(values: Sequence[float], window: int = 10) -> list[float]:
    """Means over the last `window` values: batches differ, and the plot is about the trend."""
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]
