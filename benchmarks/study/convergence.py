"""The convergence study: FishLeg beside AdamW, Muon and SOAP on the CURVES autoencoder, two batch sizes.

    python -m benchmarks.study.convergence                          # every run that the results lack (hours)
    python -m benchmarks.study.convergence --only fishleg --seeds 0
    python -m benchmarks.study.convergence --report                 # the table and the plot from the results

Each run is one thread and one line of results/convergence.jsonl, written when it ends; a run that is already
there is not repeated (unless --redo), so the study can be stopped, extended and shared among processes. Which
runs belong to the study is the table STUDY: steps per batch size, and each optimizer's grid of lr per batch
size. The best lr of a peer has to lie inside its grid, not at the edge; the report says where it does not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.common.arguments import comma_separated, integers
from benchmarks.common.machine import cpu_name
from benchmarks.common.optimizers import VARIATIONS
from benchmarks.common.paths import RESULTS
from benchmarks.study.records import Key, finite, read, versions

RECORDS = RESULTS / "convergence.jsonl"
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Entry:
    """An optimizer's part in the study: batch size -> steps, and batch size -> grid of lr."""

    steps: dict[int, int]
    lrs: dict[int, tuple[float, ...]]


SHORT = {1000: 500, 100: 1000}
LONG = {1000: 1500, 100: 2000}
FISHLEG_LR = {1000: 2e-2, 100: 1e-2}
STUDY = {
    "adamw": Entry(LONG, {1000: (1e-3, 2e-3, 4e-3), 100: (2e-3, 4e-3, 8e-3)}),
    "muon": Entry(SHORT, {1000: (1e-2, 2e-2, 4e-2), 100: (5e-3, 1e-2, 2e-2)}),
    "soap": Entry(SHORT, {1000: (6e-3, 1.2e-2, 2.4e-2), 100: (6e-3, 1.2e-2, 2.4e-2)}),
    "fishleg": Entry(SHORT, {b: (lr / 3, lr, lr * 3) for b, lr in FISHLEG_LR.items()}),
    "fishleg-anchored": Entry(SHORT, {b: (lr,) for b, lr in FISHLEG_LR.items()}),
    "fishleg-pure": Entry(SHORT, {b: (lr,) for b, lr in FISHLEG_LR.items()}),
}

VARIED = {name: Entry(SHORT, {b: (lr,) for b, lr in FISHLEG_LR.items()}) for name in VARIATIONS}
ENTRIES = {**STUDY, **VARIED}  # the variations run only where --only names them


def run(task: Key) -> dict[str, Any]:
    """One run of the study in this process, on one thread; returns its record."""
    import torch

    torch.set_num_threads(1)
    from benchmarks.train.train_autoencoder import autoencoder_problem
    from benchmarks.train.training import train

    optimizer, batch, steps, lr, seed = task
    problem = autoencoder_problem("curves")
    done = train(problem, optimizer, lr, steps, batch, seed, progress=False)
    if done.interrupted:
        raise KeyboardInterrupt
    step = max(1, steps // 100)
    return {
        "optimizer": optimizer, "batch": batch, "steps": steps, "lr": float(f"{lr:.6g}"), "seed": seed,
        **{name: finite(value) for name, value in done.figures.items()},
        "seconds": round(done.times[-1], 2), "cpu seconds": round(done.cpu_seconds, 2),
        "steps done": len(done.losses),
        "losses": [finite(x) for x in done.losses[step - 1 :: step]],  # of every step-th batch
        "settings": done.settings,
        "versions": versions(optimizer),
        "cpu": cpu_name(), "threads": 1,
        "command": "python -m benchmarks.study.convergence "
        f"--only {optimizer} --batch {batch} --lr {lr:.6g} --seeds {seed}",
    }  # fmt: skip


def tasks(args: argparse.Namespace) -> list[Key]:
    """The runs that the command line asks for, a seed at a time."""
    return [
        (name, batch, ENTRIES[name].steps[batch], lr, seed)
        for seed in args.seeds
        for batch in args.batch
        for name in args.only
        for lr in (args.lr or ENTRIES[name].lrs[batch])
    ]


def work(todo: list[Key], path: Path, workers: int) -> None:
    """Run all of it, and append each record as soon as it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def store(record: dict[str, Any]) -> None:
        # One write in append mode: several processes may share the file.
        with path.open("a") as file:
            file.write(json.dumps(record, default=str, ensure_ascii=False) + "\n")
        print(
            "{optimizer} batch {batch} lr {lr:g} seed {seed}: training NLL {train nll}, test {test nll}, "
            "{seconds} s".format(**record),
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", type=comma_separated, default=list(STUDY), help=f"of {','.join(ENTRIES)}")
    parser.add_argument("--batch", type=integers, default=list(SHORT), help="batch sizes: 1000,100")
    parser.add_argument("--seeds", type=integers, default=list(SEEDS))
    parser.add_argument("--lr", type=lambda t: [float(x) for x in t.split(",")], help="in place of the study's grid")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--results", type=Path, default=RECORDS)
    parser.add_argument("--redo", action="store_true", help="repeat runs that are there; the new record counts")
    parser.add_argument("--report", action="store_true", help="only make the table and the plot from the results")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.only) - set(ENTRIES)) + sorted(set(args.batch) - set(SHORT))
    if unknown:
        parser.error(f"unknown: {unknown}; there are {list(ENTRIES)} and batch sizes {list(SHORT)}")
    if args.workers < 1:
        parser.error(f"--workers should be 1 or more but is: {args.workers}")
    if not args.report:
        there = set() if args.redo else set(read(args.results))
        work(
            [t for t in tasks(args) if t[:3] + (float(f"{t[3]:.6g}"), t[4]) not in there],
            args.results,
            args.workers,
        )
    from benchmarks.study.convergence_report import write_study

    print(write_study(list(read(args.results).values()), args.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
