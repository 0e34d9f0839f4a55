"""Seconds to a training NLL: how long FishLeg takes to where AdamW, Muon, SOAP and PSGD end.

    python -m benchmarks.study.wallclock                 # every run that the results lack
    python -m benchmarks.study.wallclock --problem curves-1000 --seeds 3 --steps-fishleg 250
    python -m benchmarks.study.wallclock --report        # the table and the plot from the results

Every optimizer is trained by the same loop, with the steps of the convergence study and the lr that was best in
its tuning, one run after the other in one process with torch's threads: leave the machine alone meanwhile. The
training set, of the GPT's a fixed part, is evaluated some fifty times in a run, with the clock stopped. A
competitor's target is its last training NLL; FishLeg's time to it is that of the first evaluation there or below.
Each run is one line of results/wallclock.jsonl, and is not repeated unless --redo says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common.arguments import comma_separated, integers, positive
from benchmarks.common.machine import cpu_name
from benchmarks.common.optimizers import OPTIMIZERS
from benchmarks.common.paths import RESULTS
from benchmarks.study.convergence import RECORDS as STUDY_RECORDS
from benchmarks.study.entries import ENTRIES, is_fishleg
from benchmarks.study.problems import PROBLEMS
from benchmarks.study.records import Key, append, finite, read, versions
from benchmarks.study.tuning import TUNING_SEEDS, chosen, figures, rounded, tuned_lr
from benchmarks.train.training import Problem, train

RECORDS = RESULTS / "wallclock.jsonl"
NAMES = ("adamw", "muon", "soap", "psgd", "fishleg", "fishleg-medium")
SEEDS = (3, 4, 5)
EVALUATIONS = 50  # in a run

Curve = list[list[float | None]]  # of (step, seconds, training NLL)


def contestant(family: str, problem: str, study: Path) -> tuple[str, float]:
    """The row of a family that was best in the study's tuning, and its best lr."""
    records = list(read(study).values())
    name = chosen(records, problem, family)
    lr = tuned_lr(records, problem, name)
    if lr is None:
        raise SystemExit(f"{study} has no tuning runs of {name} on {problem}: run benchmarks.study.convergence first.")
    tried = ", ".join(f"{x:g}" for x in figures(records, problem, name, TUNING_SEEDS)) or "FishLeg's"
    print(f"{OPTIMIZERS[name].label}, {problem}: lr {lr:g}, the best of {tried}")
    return name, lr


def wanted(args: argparse.Namespace) -> list[Key]:
    """The runs that the command line asks for, seed by seed: what is compared runs close in time."""
    tasks: list[Key] = []
    for problem in args.problem:
        found = [contestant(family, problem, args.study) for family in args.only]
        for seed in args.seeds:
            for name, lr in found:
                shorter = args.steps_fishleg if is_fishleg(name) else None
                tasks.append((problem, name, shorter or PROBLEMS[problem].steps, rounded(lr), seed))
    return tasks


def watcher(problem: Problem, steps: int, curve: Curve) -> Callable[[float, nn.Module], None]:
    """For train(every=...): appends (step, seconds, training NLL) some EVALUATIONS times, at the last step too."""
    interval = max(1, steps // EVALUATIONS)
    step = 0

    def every(seconds: float, model: nn.Module) -> None:
        nonlocal step
        step += 1
        if step % interval == 0 or step == steps:
            curve.append([step, round(seconds, 4), finite(problem.evaluate(model, "train")["train nll"])])

    return every


def made(name: str) -> Problem:
    """A problem whose evaluations are short enough to repeat."""
    sample = PROBLEMS[name].sample
    problem = PROBLEMS[name].make()
    return problem if sample is None else replace(problem, evaluated=sample)


def run(task: Key) -> dict[str, Any]:
    """One run; its record."""
    name, optimizer, steps, lr, seed = task
    setting, problem = PROBLEMS[name], made(name)
    curve: Curve = []
    done = train(
        problem, optimizer, lr, steps, setting.batch, seed,
        every=watcher(problem, steps, curve), warmup=min(setting.warmup, steps // 4),
    )  # fmt: skip
    if done.interrupted:
        raise KeyboardInterrupt
    flag = f" --steps-fishleg {steps}" * (is_fishleg(optimizer) and steps != setting.steps)
    family = ENTRIES[optimizer].family
    return {
        "problem": name, "optimizer": optimizer, "batch": setting.batch, "steps": steps, "lr": rounded(lr),
        "seed": seed,
        "train nll": finite(done.figures["train nll"]), "test nll": finite(done.figures["test nll"]),
        "seconds": round(done.times[-1], 3), "steps done": len(done.losses),
        "curve": curve,
        "settings": done.settings, "versions": versions(optimizer),
        "cpu": cpu_name(), "threads": torch.get_num_threads(), "date": date.today().isoformat(),
        "command": f"python -m benchmarks.study.wallclock --problem {name} --only {family} --seeds {seed}{flag}",
    }  # fmt: skip


def work(todo: list[Key], path: Path) -> None:
    """Run all of it, and append each record as soon as it is there."""
    for problem, optimizer in sorted({task[:2] for task in todo}):
        # Imports, and torch's kernels' first use, are nobody's training time.
        short = replace(PROBLEMS[problem].make(), evaluated=1)
        train(short, optimizer, 1e-3, 2, PROBLEMS[problem].batch, progress=False)
    for task in todo:
        record = run(task)
        append(record, path)
        print(
            "{problem} {optimizer} lr {lr:g} seed {seed}: {steps} steps in {seconds} s, training NLL {train nll}"
            .format(**record), flush=True,
        )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--problem", type=comma_separated, default=[n for n in PROBLEMS if n != "resnet"])
    parser.add_argument("--only", type=comma_separated, default=list(NAMES), help="families of optimizers")
    parser.add_argument("--seeds", type=integers, default=list(SEEDS))
    parser.add_argument("--steps-fishleg", type=positive, help="a schedule of another length for FishLeg")
    parser.add_argument("--study", type=Path, default=STUDY_RECORDS, help="results that the best lr are taken from")
    parser.add_argument("--results", type=Path, default=RECORDS)
    parser.add_argument("--redo", action="store_true", help="repeat runs that are there; the new record counts")
    parser.add_argument("--report", action="store_true", help="only make the tables and the plot from the results")
    args = parser.parse_args(argv)
    families = list(dict.fromkeys(entry.family for entry in ENTRIES.values()))
    if unknown := sorted(set(args.only) - set(families)) + sorted(set(args.problem) - set(PROBLEMS)):
        parser.error(f"unknown: {unknown}; there are {families} and problems {list(PROBLEMS)}")
    if not args.report:
        there = set() if args.redo else set(read(args.results))
        if todo := [task for task in wanted(args) if task not in there]:
            work(todo, args.results)
    from benchmarks.study.wallclock_report import write

    print(write(list(read(args.results).values()), args.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
