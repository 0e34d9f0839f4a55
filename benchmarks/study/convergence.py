"""The convergence study: FishLeg beside AdamW, Muon, SOAP and PSGD on four problems, all with the same steps.

    python -m benchmarks.study.convergence                    # tuning: every run that the results lack (hours)
    python -m benchmarks.study.convergence --stage report     # other seeds at each optimizer's best lr
    python -m benchmarks.study.convergence --stage robust     # FishLeg at a third, twice, three times its best lr
    python -m benchmarks.study.convergence --problem gpt --only fishleg --workers 2
    python -m benchmarks.study.convergence --report           # the tables and the plot from the results

Each run is one thread and one line of results/convergence.jsonl, written when it ends; a run that is already
there is not repeated (unless --redo), so the study can be stopped, extended and shared among processes.
Tuning starts from the grids of entries.py and goes on until the best lr lies inside what was tried; with --lr it
runs those lr alone. The later stages take the best lr from the results, or --lr.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.common.arguments import comma_separated, integers, positive, rate
from benchmarks.common.machine import cpu_name
from benchmarks.common.optimizers import FROM_PYTORCH_OPTIMIZER
from benchmarks.common.paths import RESULTS
from benchmarks.study.entries import ENTRIES, STUDY, is_fishleg
from benchmarks.study.problems import PROBLEMS
from benchmarks.study.records import Key, append, finite, read, versions
from benchmarks.study.tuning import REPORT_SEEDS, TUNING_SEEDS, chosen, figures, next_runs, rounded, tuned_lr

RECORDS = RESULTS / "convergence.jsonl"
FACTORS = (1 / 3, 2.0, 3.0)  # of the best lr: the runs that tell how much it matters
LAST = 50  # steps whose losses a run is summed up by

Records = dict[Key, dict[str, Any]]


def run(task: Key) -> dict[str, Any]:
    """One run of the study in this process, on one thread; returns its record."""
    import torch

    torch.set_num_threads(1)
    from benchmarks.train.training import train

    if task[1] in FROM_PYTORCH_OPTIMIZER:
        import pytorch_optimizer  # noqa: F401 - seconds that are not the run's

    name, optimizer, steps, lr, seed = task
    problem = PROBLEMS[name]
    done = train(
        problem.make(), optimizer, lr, steps, problem.batch, seed, progress=False, warmup=problem.warmup
    )  # fmt: skip
    if done.interrupted:
        raise KeyboardInterrupt
    step, whole = max(1, steps // 100), len(done.losses) == steps
    last = done.losses[-LAST:]
    return {
        "problem": name, "optimizer": optimizer, "batch": problem.batch, "steps": steps, "lr": rounded(lr),
        "seed": seed,
        **{name: finite(value) for name, value in done.figures.items()},
        f"last {LAST} loss": finite(sum(last) / len(last)) if whole else None,
        "seconds": round(done.times[-1], 2), "cpu seconds": round(done.cpu_seconds, 2),
        "steps done": len(done.losses),
        "losses": [finite(x) for x in done.losses[step - 1 :: step]],  # of every step-th batch
        "settings": done.settings,
        "versions": versions(optimizer),
        "cpu": cpu_name(), "threads": 1,
        "command": "python -m benchmarks.study.convergence "
        f"--problem {name} --only {optimizer} --lr {lr:.6g} --seeds {seed}",
    }  # fmt: skip


def planned(args: argparse.Namespace, records: Records, there: Records) -> list[Key]:
    """The runs that the command line asks for next: best lr are of `records`, and what is `there` is not repeated."""
    tasks: list[Key] = []
    for name in args.problem:
        for optimizer in args.only:
            if name in ENTRIES[optimizer].lrs:
                found = STAGES[args.stage](args, name, optimizer, records.values(), there.values())
                tasks += [(name, optimizer, PROBLEMS[name].steps, rounded(lr), seed) for lr, seed in found]
    return [task for task in tasks if task not in there]


Runs = list[tuple[float, int]]  # lr, seed
Known = Iterable[dict[str, Any]]


def product(lrs: Iterable[float], seeds: Sequence[int]) -> Runs:
    """Every lr with every seed, a seed at a time."""
    lrs = list(lrs)
    return [(lr, seed) for seed in seeds for lr in lrs]


def tune(args: argparse.Namespace, problem: str, optimizer: str, records: Known, there: Known) -> Runs:
    """The next runs of the search for the best lr."""
    seeds = args.seeds or list(TUNING_SEEDS)
    if args.lr:
        return product(args.lr, seeds)
    found = figures(there, problem, optimizer, seeds)
    return next_runs(found, ENTRIES[optimizer].lrs[problem], seeds, PROBLEMS[problem].margin)


def report(args: argparse.Namespace, problem: str, optimizer: str, records: Known, there: Known) -> Runs:
    """Other seeds at the best lr, of the best row of each family."""
    lr = tuned_lr(records, problem, optimizer)
    if not args.lr and (lr is None or chosen(records, problem, ENTRIES[optimizer].family) != optimizer):
        print(f"{problem}: {optimizer} was not tuned, or another row of its family is better")
        return []
    return product(args.lr or [lr], args.seeds or REPORT_SEEDS)


def robust(args: argparse.Namespace, problem: str, optimizer: str, records: Known, there: Known) -> Runs:
    """The same seeds at multiples of the best lr."""
    lr = tuned_lr(records, problem, optimizer)
    if lr is None:
        print(f"{problem}: {optimizer} was not tuned")
        return []
    return product(args.lr or [lr * factor for factor in FACTORS], args.seeds or REPORT_SEEDS)


STAGES: dict[str, Callable[..., Runs]] = {"tune": tune, "report": report, "robust": robust}


def work(todo: list[Key], path: Path, workers: int) -> None:
    """Run all of it, and append each record as soon as it is there."""

    def store(record: dict[str, Any]) -> None:
        append(record, path)
        figure = PROBLEMS[record["problem"]].figure
        print(
            "{problem} {optimizer} lr {lr:g} seed {seed}: ".format(**record)
            + f"{figure} {record[figure]}, {record['seconds']} s",
            flush=True,
        )

    if workers == 1:
        for task in todo:
            store(run(task))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run, task) for task in todo]):
            store(future.result())


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--problem", type=comma_separated, default=list(PROBLEMS), help=f"of {','.join(PROBLEMS)}")
    parser.add_argument("--only", type=comma_separated, help=f"optimizers, of {','.join(ENTRIES)}")
    parser.add_argument("--stage", choices=list(STAGES), default="tune")
    parser.add_argument("--seeds", type=integers, help="in place of the stage's")
    parser.add_argument("--lr", type=lambda text: [rate(x) for x in text.split(",")], help="in place of the stage's")
    parser.add_argument("--workers", type=positive, default=1, help="processes of one thread each")
    parser.add_argument("--results", type=Path, default=RECORDS)
    parser.add_argument("--redo", action="store_true", help="repeat runs that are there; the new record counts")
    parser.add_argument("--report", action="store_true", help="only make the tables and the plot from the results")
    args = parser.parse_args(argv)
    args.only = args.only or [name for name in STUDY if args.stage != "robust" or is_fishleg(name)]
    if unknown := sorted(set(args.only) - set(ENTRIES)) + sorted(set(args.problem) - set(PROBLEMS)):
        parser.error(f"unknown: {unknown}; there are {list(ENTRIES)} and problems {list(PROBLEMS)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    args = arguments(argv)
    before = set(read(args.results)) if args.redo else set()
    done: set[Key] = set()  # in this call
    while not args.report:
        records = read(args.results)
        there = {k: r for k, r in records.items() if k not in before or k in done}
        todo = planned(args, records, there)
        if not todo:
            break
        work(todo, args.results, args.workers)
        done |= set(todo)
    from benchmarks.study.convergence_report import write_study

    print(write_study(list(read(args.results).values()), args.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
