"""The convergence study's report: its table (markdown) and plot."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.optimizers import OPTIMIZERS
from benchmarks.common.plots import COLOURS, loss_axis, pyplot, smooth
from benchmarks.common.tables import number, table

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
        "Made by `python -m benchmarks.study.convergence --report`.",
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
