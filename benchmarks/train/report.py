"""The table and the plot that a training script ends in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.plots import COLOURS, loss_axis, pyplot, smooth
from benchmarks.common.tables import number, table
from benchmarks.train.training import Problem, Run

METRIC_NAMES = {"nll": "NLL", "mse": "MSE", "accuracy": "accuracy"}


def run_table(runs: Sequence[Run]) -> str:
    """One row per run: optimizer, lr, steps, seconds and the problem's figures."""
    names = list(runs[0].figures)
    header = ["optimizer", "lr", "steps", "seconds", "ms/step"]
    header += [f"{split} {METRIC_NAMES[metric]}" for split, metric in (n.split(" ", 1) for n in names)]
    rows = []
    for run in runs:
        steps, seconds = len(run.losses), run.times[-1] if run.times else 0.0
        rows.append(
            [
                run.label + (" (interrupted)" if run.interrupted else ""),
                f"{run.lr:g}",
                str(steps),
                f"{seconds:.1f}",
                f"{1000 * seconds / max(steps, 1):.0f}",
                *(number(run.figures[n]) for n in names),
            ]
        )
    return table(header, rows)


def plot_runs(runs: Sequence[Run], problem: Problem, path: Path, reconstructions: bool) -> None:
    """Loss over steps and over seconds, below them originals and each run's reconstructions, as a PNG."""
    plt = pyplot()
    figure = plt.figure(figsize=(11, 7 if reconstructions else 4), layout="constrained")
    top, *below = figure.subfigures(2, 1, height_ratios=(3, 2)) if reconstructions else [figure]
    for axes, quantity in zip(top.subplots(1, 2, sharey=True), ("steps", "seconds"), strict=True):
        for run in runs:
            x = range(1, len(run.losses) + 1) if quantity == "steps" else run.times
            axes.plot(
                x,
                smooth(run.losses),
                COLOURS[run.optimizer],
                label=f"{run.label}, lr {run.lr:g}",
                linewidth=1.3,
            )
        axes.set(xlabel=quantity)
        loss_axis(axes)
    top.axes[0].set_ylabel("NLL of the batch")
    top.axes[0].legend()
    if below:
        plot_images(below[0], runs, problem)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


@torch.no_grad()
def plot_images(figure: Any, runs: Sequence[Run], problem: Problem, count: int = 14) -> None:
    """The first images of the test set, and what each run's autoencoder makes of them."""
    inputs, _ = problem.batch(torch.arange(min(count, len(problem.data.test))), "test")
    rows = [("original", inputs)] + [(run.label, run.model.eval()(inputs).sigmoid()) for run in runs]
    _, height, width = problem.data.image_shape
    for axes, (label, images) in zip(figure.subplots(len(rows), 1), rows, strict=True):
        strip = images.cpu().reshape(-1, height, width).permute(1, 0, 2).reshape(height, -1)
        axes.imshow(strip, cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(label, rotation=0, ha="right", va="center")
