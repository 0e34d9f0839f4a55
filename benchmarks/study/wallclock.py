"""Seconds to a training NLL on CURVES: how long FishLeg takes to where AdamW, Muon and SOAP end.

    python -m benchmarks.study.wallclock              # every run that the results lack (a quarter of an hour)
    python -m benchmarks.study.wallclock --batch 1000 --seeds 0 --steps-fishleg 250
    python -m benchmarks.study.wallclock --report     # the table and the plot from the results

Every optimizer is trained by the same loop, with the steps of the convergence study and the lr that was best in it,
one run after the other in one process with torch's threads: leave the machine alone meanwhile. The whole training
set is evaluated some fifty times in a run, with the clock stopped. A competitor's target is its last training NLL;
FishLeg's time to it is that of the first evaluation there or below. Each run is one line of results/wallclock.jsonl,
and is not repeated unless --redo says so.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from benchmarks.common.arguments import comma_separated, integers, positive
from benchmarks.common.machine import cpu_name
from benchmarks.common.optimizers import OPTIMIZERS
from benchmarks.common.paths import RESULTS
from benchmarks.common.plots import COLOURS, loss_axis, pyplot
from benchmarks.common.tables import number, table
from benchmarks.study.convergence import ENTRIES, FISHLEG_LR, SEEDS, SHORT
from benchmarks.study.convergence import RECORDS as STUDY_RECORDS
from benchmarks.study.convergence_report import best_lr, group
from benchmarks.study.records import Key, finite, read, versions
from benchmarks.train.train_autoencoder import autoencoder_problem
from benchmarks.train.training import Problem, train

RECORDS = RESULTS / "wallclock.jsonl"
NAMES = ("adamw", "muon", "soap", "fishleg", "fishleg-medium")
EVALUATIONS = 50  # of the training set in a run

Record = dict[str, Any]
Curve = Sequence[Sequence[float | None]]  # of (step, seconds, training NLL)


def is_fishleg(name: str) -> bool:
    """Whether a row of OPTIMIZERS is FishLeg or one of its variations."""
    return name.startswith("fishleg")


def lr_of(name: str, batch: int, study: Path) -> float:
    """FishLeg's lr of the study; a competitor's best by mean training NLL there."""
    if is_fishleg(name):
        return FISHLEG_LR[batch]
    records = [r for r in read(study).values() if r["steps"] == ENTRIES[name].steps[batch]]
    by_lr = group(records, batch).get(name)
    if not by_lr:
        raise SystemExit(f"{study} has no runs of {name} at batch {batch}: run benchmarks.study.convergence first.")
    lr = best_lr(by_lr)
    print(f"{OPTIMIZERS[name].label}, batch {batch}: lr {lr:g}, the best of {', '.join(f'{x:g}' for x in by_lr)}")
    return lr


def wanted(args: argparse.Namespace) -> list[Key]:
    """The runs that the command line asks for, seed by seed: what is compared runs close in time."""
    lrs = {(name, batch): lr_of(name, batch, args.study) for batch in args.batch for name in args.only}
    tasks = []
    for batch in args.batch:
        for seed in args.seeds:
            for name in args.only:
                shorter = args.steps_fishleg if is_fishleg(name) else None
                lr = float(f"{lrs[name, batch]:.6g}")  # as in a record's key
                tasks.append((name, batch, shorter or ENTRIES[name].steps[batch], lr, seed))
    return tasks


def watcher(problem: Problem, steps: int, curve: list[list[float | None]]) -> Callable[[float, nn.Module], None]:
    """For train(every=...): appends (step, seconds, training NLL) some EVALUATIONS times, at the last step too."""
    interval = max(1, steps // EVALUATIONS)
    step = 0

    def every(seconds: float, model: nn.Module) -> None:
        nonlocal step
        step += 1
        if step % interval == 0 or step == steps:
            curve.append([step, round(seconds, 4), finite(problem.evaluate(model, "train")["train nll"])])

    return every


def run(problem: Problem, task: Key) -> Record:
    """One run; its record."""
    name, batch, steps, lr, seed = task
    curve: list[list[float | None]] = []
    done = train(problem, name, lr, steps, batch, seed, every=watcher(problem, steps, curve))
    if done.interrupted:
        raise KeyboardInterrupt
    flag = f" --steps-fishleg {steps}" * (is_fishleg(name) and steps != ENTRIES[name].steps[batch])
    return {
        "optimizer": name, "batch": batch, "steps": steps, "lr": float(f"{lr:.6g}"), "seed": seed,
        "train nll": finite(done.figures["train nll"]), "test nll": finite(done.figures["test nll"]),
        "seconds": round(done.times[-1], 3), "steps done": len(done.losses),
        "curve": curve,
        "settings": done.settings, "versions": versions(name),
        "cpu": cpu_name(), "threads": torch.get_num_threads(), "date": date.today().isoformat(),
        "command": f"python -m benchmarks.study.wallclock --only {name} --batch {batch} --seeds {seed}{flag}",
    }  # fmt: skip


def work(todo: list[Key], path: Path) -> None:
    """Run all of it, and append each record as soon as it is there."""
    problem = autoencoder_problem("curves")
    for name in sorted({task[0] for task in todo}):
        # Imports, and torch's kernels' first use, are nobody's training time.
        task = next(t for t in todo if t[0] == name)
        train(problem, name, task[3], 2, task[1], progress=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    for task in todo:
        record = run(problem, task)
        with path.open("a") as file:
            file.write(json.dumps(record, default=str, ensure_ascii=False) + "\n")
        print(
            "{optimizer} batch {batch} lr {lr:g} seed {seed}: {steps} steps in {seconds} s, training NLL {train nll}"
            .format(**record), flush=True,
        )  # fmt: skip


def time_to(curve: Curve, target: float) -> float | None:
    """Seconds of the first evaluation at the target or below; None where there is none."""
    return next((t for _, t, nll in curve if t is not None and nll is not None and nll <= target), None)


# ---- the report


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


def batch_tables(records: list[Record]) -> list[str]:
    """Of one batch size: time to the rivals' NLL, and all runs."""
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


def plot(records: list[Record], path: Path) -> None:
    """Training NLL over seconds, a line a run; FishLeg's schedules of other lengths dashed."""
    plt = pyplot()
    batches = sorted({r["batch"] for r in records}, reverse=True)
    figure, panels = plt.subplots(1, len(batches), figsize=(6 * len(batches), 4.5), squeeze=False, layout="constrained")
    for axes, batch in zip(panels[0], batches, strict=True):
        labelled = set()
        for r in (r for r in records if r["batch"] == batch):
            name, steps = r["optimizer"], r["steps"]
            label = f"{OPTIMIZERS[name].label}, {steps} steps"
            known = [(seconds, nll) for _, seconds, nll in r["curve"] if nll is not None]
            axes.plot(
                [seconds for seconds, _ in known],
                [nll for _, nll in known],
                color=COLOURS[name],
                linestyle="-" if steps == ENTRIES[name].steps[batch] else "--",
                linewidth=1.1,
                label=None if label in labelled else label,
            )
            labelled.add(label)
        axes.set(xlabel="seconds of training", ylabel="training NLL", title=f"batch {batch}")
        loss_axis(axes)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(records: list[Record], results: Path) -> str:
    """Write the tables (.md) and the plot (.png) beside the results; returns the tables."""
    if not records:
        raise SystemExit(f"{results} has no runs yet: call without --report first.")
    lines = [
        "# Seconds to a training NLL on the CURVES autoencoder",
        "",
        "784-400-200-100-50-25-6 and back, set up as in [convergence.md](convergence.md), each optimizer at its",
        "best lr there. How long FishLeg takes to the NLL, over the whole training set, at which another optimizer",
        "ends with the same seed; *ratio*: that time over the other's whole time. Clocks stand still during",
        "evaluations, some fifty in a run; FishLeg's time is that of the first evaluation at the target or below,",
        "up to a fiftieth of its run too late. One run after the other in one process. Made by `make wallclock`.",
        "",
        f"Processor: {', '.join(sorted({r['cpu'] for r in records}))}, "
        f"{', '.join(sorted({str(r['threads']) for r in records}))} threads. "
        + ", ".join(sorted({f"{k} {v}" for r in records for k, v in r["versions"].items()})) + ". "
        + ", ".join(sorted({r["date"] for r in records})) + ".",
    ]  # fmt: skip
    for batch in sorted({r["batch"] for r in records}, reverse=True):
        lines += ["", f"## Batch {batch}", "", *batch_tables([r for r in records if r["batch"] == batch])]
    plot(records, results.with_suffix(".png"))
    lines += ["", f"![Training NLL over seconds]({results.with_suffix('.png').name})", ""]
    text = "\n".join(lines)
    results.with_suffix(".md").write_text(text)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", type=comma_separated, default=list(NAMES), help="rows of OPTIMIZERS")
    parser.add_argument("--batch", type=integers, default=list(SHORT), help="batch sizes: 1000,100")
    parser.add_argument("--seeds", type=integers, default=list(SEEDS))
    parser.add_argument("--steps-fishleg", type=positive, help="a schedule of another length for FishLeg")
    parser.add_argument("--study", type=Path, default=STUDY_RECORDS, help="results that the best lr are taken from")
    parser.add_argument("--results", type=Path, default=RECORDS)
    parser.add_argument("--redo", action="store_true", help="repeat runs that are there; the new record counts")
    parser.add_argument("--report", action="store_true", help="only make the tables and the plot from the results")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.only) - set(ENTRIES)) + sorted(set(args.batch) - set(SHORT)):
        parser.error(f"unknown: {unknown}; there are {list(ENTRIES)} and batch sizes {list(SHORT)}")
    if not args.report:
        there = set() if args.redo else set(read(args.results))
        if todo := [task for task in wanted(args) if task not in there]:
            work(todo, args.results)
    print(write(list(read(args.results).values()), args.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
