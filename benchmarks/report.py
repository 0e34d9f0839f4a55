"""Tables (markdown, readable as they stand) and plots of runs; and the convergence study's report."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from optimizers import OPTIMIZERS
from tables import table
from training import Problem, Run

COLOURS = {name: f"C{i}" for i, name in enumerate(OPTIMIZERS)}
METRIC_NAMES = {"nll": "NLL", "mse": "MSE", "accuracy": "accuracy"}


def pyplot() -> Any:
    """matplotlib without a screen; imported late, so that nothing else needs it."""
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


def number(value: float | None) -> str:
    """A figure for people: four digits, or what went wrong."""
    return "diverged" if value is None or not math.isfinite(value) else f"{value:.4g}"


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


def smooth(values: Sequence[float], window: int = 10) -> list[float]:
    """Means over the last `window` values: batches differ, and the plot is about the trend."""
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]


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


# ---- the convergence study

Records = list[dict[str, Any]]


def mean(values: Sequence[float | None]) -> float:
    """The mean, infinite if any run diverged."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if values and len(known) == len(values) else math.inf


def group(records: Records, batch: int) -> dict[str, dict[float, Records]]:
    """optimizer -> lr -> its records by seed, for one batch size."""
    groups: dict[str, dict[float, Records]] = defaultdict(lambda: defaultdict(list))
    for record in sorted(records, key=lambda r: (list(OPTIMIZERS).index(r["optimizer"]), r["lr"], r["seed"])):
        if record["batch"] == batch:
            groups[record["optimizer"]][record["lr"]].append(record)
    return groups


def best_lr(by_lr: dict[float, Records]) -> float:
    """The lr of the lowest mean training NLL, among those with the most seeds."""
    most = max(len(records) for records in by_lr.values())
    full = {lr: records for lr, records in by_lr.items() if len(records) == most}
    return min(full, key=lambda lr: mean([r["train nll"] for r in full[lr]]))


def study_table(groups: dict[str, dict[float, Records]]) -> str:
    """All lr of all optimizers; each one's best lr is marked, and whether it is at its grid's edge."""
    rows = []
    for optimizer, by_lr in groups.items():
        best = best_lr(by_lr)
        for lr, records in by_lr.items():
            mark = ""
            if len(by_lr) > 1 and lr == best:
                mark = "best, at the grid's edge" if lr in (min(by_lr), max(by_lr)) else "best"
            cpu = sum(r["cpu seconds"] for r in records) / sum(r["steps done"] for r in records)
            rows.append(
                [
                    OPTIMIZERS[optimizer].label,
                    f"{lr:g}",
                    str(records[0]["steps"]),
                    number(mean([r["train nll"] for r in records])),
                    ", ".join(number(r["train nll"]) for r in records),
                    number(mean([r["test nll"] for r in records])),
                    number(mean([r["train mse"] for r in records])),
                    f"{1000 * cpu:.0f}",
                    mark,
                ]
            )
    header = [
        "optimizer",
        "lr",
        "steps",
        "train NLL",
        "of each seed",
        "test NLL",
        "train MSE",
        "CPU ms/step",
        "",
    ]
    return table(header, rows)


def plot_study(groups: dict[int, dict[str, dict[float, Records]]], path: Path) -> None:
    """Training loss over steps at each optimizer's best lr: mean over the seeds, and their range."""
    plt = pyplot()
    figure, panels = plt.subplots(1, len(groups), figsize=(6 * len(groups), 4.5), squeeze=False, layout="constrained")
    for axes, (batch, by_optimizer) in zip(panels[0], groups.items(), strict=True):
        for optimizer, by_lr in by_optimizer.items():
            lr = best_lr(by_lr)
            whole = [r for r in by_lr[lr] if None not in r["losses"]]
            if not whole:
                continue
            losses = torch.tensor([smooth(r["losses"], 5) for r in whole])
            steps = torch.linspace(0, whole[0]["steps"], losses.shape[1] + 1)[1:]
            colour = COLOURS[optimizer]
            axes.plot(
                steps,
                losses.mean(0),
                colour,
                label=f"{OPTIMIZERS[optimizer].label}, lr {lr:g}",
                linewidth=1.3,
            )
            axes.fill_between(steps, losses.amin(0), losses.amax(0), color=colour, alpha=0.2, linewidth=0)
        axes.set(xlabel="steps", ylabel="training NLL of the batch", title=f"batch {batch}")
        loss_axis(axes)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_study(records: Records, results: Path) -> str:
    """Write the study's table (.md) and plot (.png) beside the results; returns the table's text."""
    groups = {batch: group(records, batch) for batch in sorted({r["batch"] for r in records}, reverse=True)}
    if not groups:
        raise SystemExit(f"{results} has no runs yet: call without --report first.")
    lines = [
        "# Convergence on the CURVES autoencoder",
        "",
        "784-400-200-100-50-25-6 and back, ReLU, He initialisation, 18,000 training images, no weight decay,",
        "lr falling to 0 along half a cosine. NLL and squared error (MSE) are sums over an image's pixels,",
        "means over all images of the training or test set after the last step. A seed decides the initial",
        "parameters and the order of the data. One thread, beside other work: hence CPU time.",
        "Made by `python benchmarks/convergence.py --report`.",
        "",
        f"Processor: {', '.join(sorted({r['cpu'] for r in records}))}. "
        + ", ".join(sorted({f"{k} {v}" for r in records for k, v in r["versions"].items()})) + ".",
    ]  # fmt: skip
    for batch, by_optimizer in groups.items():
        lines += ["", f"## Batch {batch}", "", study_table(by_optimizer)]
    plot_study(groups, results.with_suffix(".png"))
    lines += [
        "",
        f"![Training NLL over steps, at each optimizer's best lr]({results.with_suffix('.png').name})",
        "",
    ]
    text = "\n".join(lines)
    results.with_suffix(".md").write_text(text)
    return text
