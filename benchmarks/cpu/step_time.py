"""What a training step costs: FishLeg beside fused AdamW and the published library's way, in one process.

    python -m benchmarks.cpu.step_time                               # everything: some minutes
    python -m benchmarks.cpu.step_time --model mnist --rounds 5
    python -m benchmarks.cpu.step_time --model growth                # cost over a layer's width, and its exponent

A round is one cycle of whole training steps (zero_grad, forward, backward, optimizer) of every contestant in turn,
with one λ update every 10 steps and anchoring as often as it is FishLeg's default. Ratios are taken within a round,
so that a machine that slows down slows all of them; what is printed are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import models
from benchmarks.common.arguments import comma_separated, positive
from benchmarks.common.machine import cpu_name
from benchmarks.common.paths import RESULTS
from benchmarks.cpu.contestants import CONTESTANTS, WARM_UP, TimedTraining, measure
from benchmarks.cpu.step_time_report import FIGURES, write
from benchmarks.cpu.summary import exponent, ratios, spread
from fishleg_fast import __version__

TIMES = RESULTS / "step_time.json"
WIDTHS = {"mnist": models.MNIST_WIDTHS, "faces": models.FACES_WIDTHS}
GROWTH = (250, 500, 1000, 2000)  # of one square Linear
GROWING = ("fishleg", "fishleg-dense")  # what is measured on it
SPEED_UPS = {
    "theta": "θ step",
    "ordinary": "ordinary θ step",
    "aux": "λ update",
    "step": "optimizer.step()",
    "whole": "whole step",
}


def comparison_record(model: str, names: Sequence[str], batch: int, rounds: int) -> dict[str, Any]:
    """Every contestant on one model."""
    widths = WIDTHS[model]
    trainings = [TimedTraining(name, lambda: models.autoencoder(widths), widths[0], batch) for name in names]
    times, steps = measure(trainings, rounds, model)
    found = dict(zip(names, times, strict=True))
    contestants = {}
    for name, mine in found.items():
        entry: dict[str, Any] = {"label": CONTESTANTS[name][0], **{f: spread(r[f] for r in mine) for f in FIGURES}}
        entry["to adamw"] = ratios(mine, found["adamw"], "whole")
        if "published" in found and name.startswith("fishleg"):
            entry["speed-up"] = {text: ratios(found["published"], mine, f) for f, text in SPEED_UPS.items()}
        contestants[name] = entry
    return {"model": model, "widths": widths, "batch": batch, "rounds": rounds, "cycle": steps,
            "contestants": contestants}  # fmt: skip


def growth_record(names: Sequence[str], batch: int, rounds: int) -> dict[str, Any]:
    """FishLeg on one square Linear of growing width; all widths in every round, and an exponent of each round."""
    names = [n for n in names if n in GROWING]
    pairs = [(name, width) for name in names for width in GROWTH]
    linear = lambda width: nn.Sequential(nn.Linear(width, width))
    trainings = [TimedTraining(n, lambda w=w: linear(w), w, batch) for n, w in pairs]
    times, steps = measure(trainings, rounds, "growth")
    found = dict(zip(pairs, times, strict=True))
    contestants = {}
    for name in names:
        entry: dict[str, Any] = {"label": CONTESTANTS[name][0]}
        for figure in ("ordinary", "step", "passes"):
            by_width = [[r[figure] for r in found[name, width]] for width in GROWTH]
            by_round = list(zip(*by_width, strict=True))
            entry[figure] = {
                "ms": [spread(column) for column in by_width],
                "exponent": spread(exponent(GROWTH, row) for row in by_round),
                "last two": spread(exponent(GROWTH[-2:], row[-2:]) for row in by_round),
            }
        contestants[name] = entry
    return {"model": "growth", "widths": GROWTH, "batch": batch, "rounds": rounds, "cycle": steps,
            "contestants": contestants}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=[*WIDTHS, "growth", "all"], default="all")
    parser.add_argument("--batch", type=positive, default=100)
    parser.add_argument("--rounds", type=positive, default=15, help=f"that count; {WARM_UP} more go before them")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's)")
    parser.add_argument("--only", type=comma_separated, default=list(CONTESTANTS), help=",".join(CONTESTANTS))
    parser.add_argument("--out", type=Path, default=TIMES, help="results, .json; the tables go beside it")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.only) - set(CONTESTANTS)):
        parser.error(f"unknown: {unknown}; there are {list(CONTESTANTS)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    names = [n for n in CONTESTANTS if n in args.only or n == "adamw"]  # every ratio is to AdamW
    chosen = [*WIDTHS, "growth"] if args.model == "all" else [args.model]
    if not set(GROWING) & set(names):
        if args.model == "growth":
            parser.error(f"growth is measured for {' and '.join(GROWING)}, but --only names neither")
        chosen = [model for model in chosen if model != "growth"]
    records = json.loads(args.out.read_text()) if args.out.exists() else {}  # of other models and batch sizes
    load = f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"  # others' work spoils the times
    for model in chosen:
        record = (
            growth_record(names, args.batch, args.rounds)
            if model == "growth"
            else comparison_record(model, names, args.batch, args.rounds)
        )
        flags = f"--model {model} --batch {args.batch} --rounds {args.rounds} --threads {torch.get_num_threads()}"
        flags += f" --only {','.join(args.only)}" * (len(names) < len(CONTESTANTS))
        record |= {
            "cpu": cpu_name(), "threads": torch.get_num_threads(), "load before": load,
            "date": date.today().isoformat(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "fishleg_fast": __version__},
            "command": f"python -m benchmarks.cpu.step_time {flags}",
        }  # fmt: skip
        records[f"{model}, batch {args.batch}"] = record
        text = write(records, args.out)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
