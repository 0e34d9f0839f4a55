"""One table of all evidence: problem × optimizer, from the studies' records.

    python -m benchmarks.study.evidence     # writes results/README.md

Loss at equal steps and the range of lr are of results/convergence.jsonl, seconds of results/wallclock.jsonl, memory of
results/state_memory.json; each of those files says by which command, machine and versions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.common.optimizers import OPTIMIZERS
from benchmarks.common.paths import RESULTS
from benchmarks.common.tables import number, table
from benchmarks.study.convergence_report import reported
from benchmarks.study.problems import PROBLEMS
from benchmarks.study.records import read
from benchmarks.study.tuning import TUNING_SEEDS, figure, figures
from benchmarks.study.wallclock_report import time_to

Records = Sequence[dict[str, Any]]

NAMES = ("fishleg", "muon", "soap", "adamw")
CLOSE = 1.1  # times the best figure: what a range of lr stays within

INTRODUCTION = f"""# Evidence

Made by `python -m benchmarks.study.evidence` from the records beside this file, each of which names its machine,
versions and command.

- *loss*: the problem's figure at equal steps, mean and standard deviation over seeds 3 to 7, each optimizer at the lr
  that was best with seeds 0 to 2 ([convergence.md](convergence.md)).
- *lr*: that lr, and the range of those tried whose figure with seed {TUNING_SEEDS[0]} is within {CLOSE:g} times the
  best one's.
- *seconds to Muon's loss*: to the training loss at which Muon's run with the same seed ends, over all the seconds of
  that run, two threads ([wallclock.md](wallclock.md)): mean over the seeds that were run.
- *state*: bytes kept between steps beside the parameters and their gradients, over the parameters'
  ([state_memory.json](state_memory.json)).
"""


def loss(runs: Records) -> str:
    """Mean and standard deviation."""
    values = [figure(r) for r in runs]
    spread = f" ± {number(stdev(values))}" if len(values) > 1 else ", one seed"
    return number(mean(values)) + spread


def rates(records: Records, problem: str, optimizer: str, lr: float) -> str:
    """The lr, and the range in which it hardly matters."""
    found = figures(records, problem, optimizer, TUNING_SEEDS)
    first = {x: by_seed[TUNING_SEEDS[0]] for x, by_seed in found.items() if TUNING_SEEDS[0] in by_seed}
    if not first:
        return f"{lr:g}"
    close = [x for x, value in first.items() if value <= CLOSE * min(first.values())]
    return f"{lr:g} ({min(close):g} to {max(close):g})"


def seconds(records: Records, problem: str, optimizer: str) -> str:
    """To Muon's final loss, over Muon's seconds, and of how many seeds."""
    runs = {
        (r["optimizer"], r["seed"]): r
        for r in records
        if r["problem"] == problem and r["steps"] == PROBLEMS[problem].steps
    }
    ratios = []
    for (name, seed), muon in runs.items():
        mine = runs.get((optimizer, seed))
        if name == "muon" and mine is not None and muon["train nll"] is not None:
            reached = time_to(mine["curve"], muon["train nll"])
            ratios.append(None if reached is None else reached / muon["seconds"])
    if not ratios:
        return ""
    known = [r for r in ratios if r is not None]
    missed = len(ratios) - len(known)
    told = f" ({missed} of {len(ratios)} seeds do not get there)" if missed else ""
    return f"{mean(known):.2f}{told}" if known else "not reached"


def write(folder: Path = RESULTS) -> str:
    """Make the table."""
    convergence = list(read(folder / "convergence.jsonl").values())
    wallclock = list(read(folder / "wallclock.jsonl").values())
    memory = {(r["problem"], r["optimizer"]): r for r in json.loads((folder / "state_memory.json").read_text())}
    lines = [INTRODUCTION]
    for problem, setting in PROBLEMS.items():
        groups = reported(convergence, problem)
        rows = []
        for name in NAMES:
            if name in groups:
                kept = memory.get((problem, name))
                rows.append([
                    OPTIMIZERS[name].label, loss(groups[name]),
                    rates(convergence, problem, name, groups[name][0]["lr"]),
                    seconds(wallclock, problem, name), f"{kept['per parameter byte']:.3g}" if kept else "",
                ])  # fmt: skip
        if rows:
            lines += [
                f"## {setting.title}", "", f"{setting.steps} steps; loss: {setting.figure_name}.", "",
                table(["optimizer", "loss", "lr", "seconds to Muon's loss", "state"], rows), "",
            ]  # fmt: skip
    text = "\n".join(lines)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    print(write())
    sys.exit(0)
