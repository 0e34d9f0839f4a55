"""MNIST's deep autoencoder at batch 1000, beside the training losses that others published for it.

    python -m benchmarks.study.mnist --data DIR --lr 0.01     # MNIST's four IDX files in DIR; a run is minutes
    python -m benchmarks.study.mnist --report                 # results/mnist.md from results/mnist.jsonl

Each run is a line of the records. Nobody tunes here but by --lr: all runs are in the table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.arguments import comma_separated, integers, positive, rate
from benchmarks.common.machine import cpu_name
from benchmarks.common.optimizers import OPTIMIZERS
from benchmarks.common.paths import RESULTS
from benchmarks.common.tables import number, table
from benchmarks.study.records import append, finite, read, versions
from benchmarks.study.tuning import rounded
from benchmarks.train.datasets import DataError
from benchmarks.train.train_autoencoder import autoencoder_problem
from benchmarks.train.training import train

RECORDS = RESULTS / "mnist.jsonl"
BATCH, STEPS_AN_EPOCH = 1000, 60
PUBLISHED = [("K-BFGS, as published", 120, 52.42), ("K-FAC, as published", 75, 52.90)]  # label, epochs, loss

TEXT = """# MNIST's autoencoder at batch 1000

784-1000-500-250-30 and back, ReLU, 60,000 images of grey values, Bernoulli likelihood: the training loss after the last
step is a sum over an image's pixels, a mean over the images. lr falls to 0 along half a cosine; no weight decay. The
published losses are of Goldfarb, Ren and Bahamou (*Practical quasi-Newton methods for training deep neural networks*,
2020), who tuned their methods and kept lr constant; settings other than net, data and batch differ. Other rows are runs
of one seed, all that were made. Made by `python -m benchmarks.study.mnist --report`.

"""


def run(data: Path, optimizer: str, lr: float, epochs: int, seed: int, threads: int) -> dict[str, Any]:
    """The record of one run."""
    torch.set_num_threads(threads)
    problem = autoencoder_problem("mnist", data)
    done = train(problem, optimizer, lr, epochs * STEPS_AN_EPOCH, BATCH, seed)
    if done.interrupted:
        raise KeyboardInterrupt
    return {
        "problem": "mnist", "optimizer": optimizer, "batch": BATCH, "steps": epochs * STEPS_AN_EPOCH, "lr": rounded(lr),
        "seed": seed, **{name: finite(value) for name, value in done.figures.items()},
        "seconds": round(done.times[-1], 1), "cpu seconds": round(done.cpu_seconds, 1), "steps done": len(done.losses),
        "losses": [finite(x) for x in done.losses[STEPS_AN_EPOCH - 1 :: STEPS_AN_EPOCH]],  # of an epoch's last batch
        "settings": done.settings, "versions": versions(optimizer), "cpu": cpu_name(), "threads": threads,
        "command": f"python -m benchmarks.study.mnist --data DIR --only {optimizer} --lr {lr:g} --epochs {epochs} "
        f"--seeds {seed} --threads {threads}",
    }  # fmt: skip


def report(records: Sequence[dict[str, Any]]) -> str:
    """The page."""
    rows = [[label, "", str(epochs), "", number(loss), "", "", ""] for label, epochs, loss in PUBLISHED]
    for r in sorted(records, key=lambda r: (r["optimizer"], r["steps"], r["lr"], r["seed"])):
        rows.append([
            OPTIMIZERS[r["optimizer"]].label, f"{r['lr']:g}", str(r["steps"] // STEPS_AN_EPOCH), str(r["seed"]),
            "diverged" if r["train nll"] is None else number(r["train nll"]), number(r["test nll"]),
            f"{1000 * r['cpu seconds'] / r['steps done']:.0f}", f"{r['cpu']}, {r['threads']} thread(s)",
        ])  # fmt: skip
    head = ["optimizer", "lr", "epochs", "seed", "training loss", "test loss", "CPU ms/step", "processor"]
    known = {name: version for r in records for name, version in r["versions"].items()}
    return TEXT + table(head, rows) + "\n\n" + ", ".join(f"{k} {v}" for k, v in sorted(known.items())) + ".\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of MNIST's four IDX files")
    parser.add_argument("--only", type=comma_separated, default=["fishleg"], help="optimizers (default: fishleg)")
    parser.add_argument("--lr", type=rate, default=1e-2)
    parser.add_argument("--epochs", type=positive, default=75)
    parser.add_argument("--seeds", type=integers, default=[0])
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--report", action="store_true", help="only make the page")
    args = parser.parse_args(argv)
    if not args.report:
        if args.data is None:
            parser.error("--data DIR is needed, the folder with MNIST's four IDX files")
        if unknown := sorted(set(args.only) - set(OPTIMIZERS)):
            parser.error(f"unknown: {unknown}; there are {list(OPTIMIZERS)}")
        try:
            for optimizer in args.only:
                for seed in args.seeds:
                    append(run(args.data, optimizer, args.lr, args.epochs, seed, args.threads), RECORDS)
        except DataError as error:
            parser.exit(2, f"{error}\n")
    text = report(list(read(RECORDS).values()))
    RECORDS.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
