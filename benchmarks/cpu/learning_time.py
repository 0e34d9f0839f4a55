"""What optimizer.step() takes where steps are limited, and where λ is learned besides anchoring, or alone.

    python -m benchmarks.cpu.learning_time

The first steps on the problems of the study, at the lr that was best there: most of them are near the limit, and are
measured. The ways take turns, ten steps each, which is a cycle of all of them; ratios are of one round each.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import date
from statistics import median, quantiles

import torch
from torch import Tensor

from benchmarks.common.arguments import comma_separated, positive
from benchmarks.common.machine import cpu_name
from benchmarks.common.optimizers import OPTIMIZERS
from benchmarks.common.paths import RESULTS
from benchmarks.common.tables import table
from benchmarks.study.problems import PROBLEMS
from benchmarks.study.records import read, versions
from benchmarks.study.tuning import tuned_lr
from benchmarks.train.training import batches

WAYS = ("fishleg-unlimited", "fishleg", "fishleg-learned", "fishleg-pure")  # the others are compared with the first
CYCLE, WARM_UP = 10, 2  # steps; rounds that do not count


class Training:
    """One way at work on a problem."""

    def __init__(self, problem: str, way: str) -> None:
        torch.manual_seed(0)
        setting = PROBLEMS[problem]
        self.made = setting.make()
        self.model = self.made.make_model().train()
        lr = tuned_lr(read(RESULTS / "convergence.jsonl").values(), problem, "fishleg") or 1e-2
        (self.optimizer,) = OPTIMIZERS[way].make(self.model, self.made.likelihood, lr)
        self.stream: Iterator[Tensor] = batches(len(self.made.data.train), setting.batch, 0)

    def cycle(self) -> tuple[float, float]:
        """Seconds of ten whole steps, and of their optimizer.step()."""
        inside, start = 0.0, time.perf_counter()
        for _ in range(CYCLE):
            inputs, targets = self.made.batch(next(self.stream))
            self.optimizer.zero_grad()
            self.made.likelihood.nll(targets, self.model(inputs)).backward()
            before = time.perf_counter()
            self.optimizer.step()
            inside += time.perf_counter() - before
        return time.perf_counter() - start, inside


def measure(problem: str, rounds: int) -> list[list[str]]:
    """The rows of a problem."""
    trainings = [Training(problem, way) for way in WAYS]
    found = [[t.cycle() for t in trainings] for _ in range(rounds + WARM_UP)][WARM_UP:]
    rows = []
    for k, way in enumerate(WAYS):
        whole, inside = ([1000 * r[k][part] / CYCLE for r in found] for part in (0, 1))
        low, middle, high = quantiles([r[k][1] / r[0][1] for r in found], n=4)
        rows.append([
            PROBLEMS[problem].title, OPTIMIZERS[way].label if way != "fishleg" else "FishLeg: default",
            f"{median(whole):.3g}", f"{median(inside):.3g}", f"{middle:.2f}× ({low:.2f} to {high:.2f})",
        ])  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--problem", type=comma_separated, default=list(PROBLEMS))
    parser.add_argument("--rounds", type=positive, default=8)
    parser.add_argument("--threads", type=positive, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = [row for problem in args.problem for row in measure(problem, args.rounds)]
    head = ["problem", "way", "ms a step", "of it optimizer.step()", "over that with step_limit=None"]
    known = ", ".join(f"{name} {version}" for name, version in versions("fishleg").items())
    text = (
        "# What limiting steps takes, and learning λ\n\nMs, means over ten steps, medians over rounds in which the ways"
        " take turns; ratios "
        f"within each round, quartiles in brackets.\n\n{table(head, rows)}\n\n{cpu_name()}, {args.threads} threads, "
        f"{known}, {date.today()}: `python -m benchmarks.cpu.learning_time --rounds {args.rounds}`\n"
    )
    (RESULTS / "learning_time.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
