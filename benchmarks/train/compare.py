"""What the training scripts share: their flags, and FishLeg beside AdamW on one problem."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common.arguments import positive, rate
from benchmarks.train.report import plot_runs, run_table
from benchmarks.train.training import Problem, Run, train

STEPS_ADAMW = 3  # AdamW's steps for one of FishLeg's


@dataclass(frozen=True)
class Defaults:
    """What a data set is trained with unless the command line says otherwise."""

    steps: int
    batch_size: int
    lr_fishleg: float
    lr_adamw: float
    warmup: int = 0  # steps
    adamw_ratio: int = STEPS_ADAMW


def flags(description: str, data: bool = True) -> argparse.ArgumentParser:
    """The flags that every training script has; ``data``: it may read a folder."""
    first, _, rest = description.partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if data:
        parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the data set's files")
    parser.add_argument("--steps", type=positive, help="FishLeg's steps")
    parser.add_argument("--steps-adamw", type=positive, help="AdamW's steps (default: a multiple of FishLeg's)")
    parser.add_argument("--batch-size", type=positive)
    parser.add_argument("--lr-fishleg", type=rate)
    parser.add_argument("--lr-adamw", type=rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs"), metavar="DIR", help="folder of the plot")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def setup(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line and set torch's threads."""
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def compare(
    problem: Problem, args: argparse.Namespace, defaults: Defaults, name: str, reconstructions: bool = False
) -> int:
    """Train the problem's model by AdamW and by FishLeg; print the table, write the plot."""
    steps = args.steps or defaults.steps
    batch = args.batch_size or defaults.batch_size
    if batch > len(problem.data.train):
        batch = len(problem.data.train)
        print(f"batch size: {batch}, the whole training set")
    to_train = [
        ("adamw", args.lr_adamw or defaults.lr_adamw, args.steps_adamw or defaults.adamw_ratio * steps),
        ("fishleg", args.lr_fishleg or defaults.lr_fishleg, steps),
    ]
    runs: list[Run] = []
    for optimizer, lr, count in to_train:
        runs.append(train(problem, optimizer, lr, count, batch, args.seed, warmup=defaults.warmup))
        if runs[-1].interrupted:
            break
    print(
        f"\n{problem.data.name}: {len(problem.data.train)} training examples, batch {batch}, "
        f"seed {args.seed}, {torch.get_num_threads()} threads, {args.device}\n"
    )
    print(run_table(runs))
    if "train mse" in runs[0].figures:
        print("\nNLL and squared error (MSE) are sums over an image's pixels, means over all images.")
    path = args.out / f"{name}.png"
    plot_runs(runs, problem, path, reconstructions)
    print(f"\nPlot: {path}")
    return 130 if runs[-1].interrupted else 0
