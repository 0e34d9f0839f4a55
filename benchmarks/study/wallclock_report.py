"""The report of the study of seconds: its tables (markdown) and plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.common.optimizers import OPTIMIZERS
from benchmarks.common.plots import COLOURS, loss_axis, pyplot
from benchmarks.common.tables import number, table
from benchmarks.study.entries import is_fishleg
from benchmarks.study.problems import PROBLEMS

Record = dict[str, Any]

INTRODUCTION = """# Seconds to a training NLL

Problems set up as in [convergence.md](convergence.md), each optimizer at the lr that was best in tuning there.
How long FishLeg takes to the training NLL at which another optimizer ends with the same seed; *ratio*: that
time over the other's whole time. The NLL is that of the whole training set, on the GPT of 128 windows spread
evenly over it, always the same. Clocks stand still during evaluations, some fifty in a run; FishLeg's time is
that of the first evaluation at the target or below, up to a fiftieth of its run too late. One run after the
other in one process. Made by `make wallclock`."""


def time_to(curve: Sequence[Sequence[float | None]], target: float) -> float | None:
    """Seconds of the first evaluation at the target or below; None where there is none."""
    return next((t for _, t, nll in curve if t is not None and nll is not None and nll <= target), None)


def race_rows(mine: dict[int, Record], rival: dict[int, Record]) -> list[str]:
    """A row's figures: FishLeg to the rival's final NLL, over the seeds that both have."""
    seeds = sorted(set(mine) & set(rival))
    reached, ratios = [], []
    for seed in seeds:
        final = rival[seed]["train nll"]
        seconds = None if final is None else time_to(mine[seed]["curve"], final)
        reached.append(seconds)
        ratios.append(math.inf if seconds is None else seconds / rival[seed]["seconds"])
    say = lambda values: ", ".join("not reached" if v is None or math.isinf(v) else f"{v:.3g}" for v in values)
    return [
        ", ".join(number(rival[s]["train nll"]) for s in seeds),
        say(reached),
        ", ".join(f"{rival[s]['seconds']:.3g}" for s in seeds),
        say(ratios),
        say([mean(ratios)]),
    ]


def tables(records: list[Record]) -> list[str]:
    """Of one problem: time to the rivals' NLL, and all runs."""
    runs: dict[tuple[str, int, float], dict[int, Record]] = {}  # optimizer, steps, lr -> seed -> record
    for r in sorted(records, key=lambda r: (list(OPTIMIZERS).index(r["optimizer"]), r["steps"], r["lr"], r["seed"])):
        runs.setdefault((r["optimizer"], r["steps"], r["lr"]), {})[r["seed"]] = r
    label = lambda kind: f"{OPTIMIZERS[kind[0]].label}, {kind[1]} steps, lr {kind[2]:g}"
    pairs = [
        (mine, rival)
        for mine in runs
        for rival in runs
        if is_fishleg(mine[0]) and not is_fishleg(rival[0]) and set(runs[mine]) & set(runs[rival])
    ]
    lines = []
    if pairs:
        header = ["", "target NLL of each seed", "FishLeg's seconds", "its seconds", "ratio of each seed", "mean"]
        rows = [[f"{label(a)}: to {label(b)}", *race_rows(runs[a], runs[b])] for a, b in pairs]
        lines += [table(header, rows), ""]
    rows = [
        [
            label(kind),
            ", ".join(number(r["train nll"]) for r in by_seed.values()),
            ", ".join(f"{r['seconds']:.3g}" for r in by_seed.values()),
            f"{mean(1000 * r['seconds'] / r['steps done'] for r in by_seed.values()):.3g}",
        ]
        for kind, by_seed in runs.items()
    ]
    return [*lines, table(["", "final training NLL of each seed", "seconds", "ms/step"], rows)]


def plot(records: list[Record], names: list[str], path: Path) -> None:
    """Training NLL over seconds, a line a run; FishLeg's schedules of other lengths dashed."""
    plt = pyplot()
    figure, panels = plt.subplots(1, len(names), figsize=(6 * len(names), 4.5), squeeze=False, layout="constrained")
    for axes, problem in zip(panels[0], names, strict=True):
        labelled = set()
        for r in (r for r in records if r["problem"] == problem):
            name, steps = r["optimizer"], r["steps"]
            label = f"{OPTIMIZERS[name].label}, {steps} steps"
            known = [(seconds, nll) for _, seconds, nll in r["curve"] if nll is not None]
            axes.plot(
                [seconds for seconds, _ in known],
                [nll for _, nll in known],
                color=COLOURS[name],
                linestyle="-" if steps == PROBLEMS[problem].steps else "--",
                linewidth=1.1,
                label=None if label in labelled else label,
            )
            labelled.add(label)
        axes.set(xlabel="seconds of training", ylabel="training NLL", title=PROBLEMS[problem].title)
        loss_axis(axes)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(records: list[Record], results: Path) -> str:
    """Write the tables (.md) and the plot (.png) beside the results; returns the tables."""
    if not records:
        raise SystemExit(f"{results} has no runs yet: call without --report first.")
    names = [name for name in PROBLEMS if any(r["problem"] == name for r in records)]
    lines = [
        INTRODUCTION,
        "",
        f"Processor: {', '.join(sorted({r['cpu'] for r in records}))}, "
        f"{', '.join(sorted({str(r['threads']) for r in records}))} threads. "
        + ", ".join(sorted({f"{k} {v}" for r in records for k, v in r["versions"].items()})) + ". "
        + ", ".join(sorted({r["date"] for r in records})) + ".",
    ]  # fmt: skip
    for name in names:
        lines += ["", f"## {PROBLEMS[name].title}", "", *tables([r for r in records if r["problem"] == name])]
    plot(records, names, results.with_suffix(".png"))
    lines += ["", f"![Training NLL over seconds]({results.with_suffix('.png').name})", ""]
    text = "\n".join(lines)
    results.with_suffix(".md").write_text(text)
    return text
