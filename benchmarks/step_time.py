"""What a training step costs: FishLeg beside fused AdamW and the published library's way, in one process.

    python benchmarks/step_time.py                               # everything: some minutes
    python benchmarks/step_time.py --model mnist --rounds 5
    python benchmarks/step_time.py --model growth                # cost over a layer's width, and its exponent

A round is one cycle of whole training steps (zero_grad, forward, backward, optimizer) of every contestant in turn,
with one λ update every 10 steps and anchoring as often as it is FishLeg's default. Ratios are taken within a round,
so that a machine that slows down slows all of them; what is printed are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from inspect import signature
from pathlib import Path
from statistics import mean, median
from typing import Any

import models
import torch
from compare import positive
from convergence import cpu_name
from published import Published
from report import table
from torch import Tensor, nn
from tqdm import tqdm

from fishleg_fast import BernoulliLikelihood, FishLeg, __version__

RESULTS = Path(__file__).resolve().parent / "results" / "step_time.json"
WIDTHS = {"mnist": models.MNIST_WIDTHS, "faces": models.FACES_WIDTHS}
GROWTH = (250, 500, 1000, 2000)  # of one square Linear
GROWING = ("fishleg", "fishleg-dense")  # what is measured on it
UPDATE_EVERY = 10  # steps from λ update to λ update
WARM_UP = 2  # rounds that do not count: first allocations, and FishLeg's start of Q


class Stopwatch:
    """Seconds spent inside methods, which it wraps on one object each."""

    def __init__(self) -> None:
        self.seconds = {"aux": 0.0, "anchor": 0.0}

    def watch(self, owner: Any, method: str, share: str) -> None:
        """Count the time of `owner.method` as `share`."""
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[share] += time.perf_counter() - start

        setattr(owner, method, timed)


@dataclass
class Runner:
    """A contestant at work: `step(inputs)` is everything after backward()."""

    optimizer: Any
    step: Callable[[Tensor], Any]
    anchor_every: int = 0


def adamw(model: nn.Module, likelihood: Any, clock: Stopwatch) -> Runner:
    """torch's AdamW, fused."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return Runner(optimizer, lambda inputs: optimizer.step())


def fishleg(**settings: Any) -> Callable[[nn.Module, Any, Stopwatch], Runner]:
    """FishLeg with its defaults but for the settings named."""

    def make(model: nn.Module, likelihood: Any, clock: Stopwatch) -> Runner:
        optimizer = FishLeg(model, likelihood=likelihood, lr=1e-3, update_aux_every=UPDATE_EVERY, **settings)
        clock.watch(optimizer, "_anchor", "anchor")
        clock.watch(optimizer._aux, "update", "aux")
        return Runner(optimizer, lambda inputs: optimizer.step(), optimizer.settings["anchor_every"])

    return make


def published(model: nn.Module, likelihood: Any, clock: Stopwatch) -> Runner:
    """The eager per-layer way. lr is tiny, since only time counts and nothing should leave the range of floats."""
    optimizer = Published(model, likelihood, lr=1e-6, update_aux_every=UPDATE_EVERY)
    clock.watch(optimizer, "aux_update", "aux")
    return Runner(optimizer, optimizer.step)


CONTESTANTS: dict[str, tuple[str, Callable[[nn.Module, Any, Stopwatch], Runner]]] = {
    "adamw": ("AdamW, fused", adamw),
    "fishleg-medium": ('FishLeg, precision="medium"', fishleg(precision="medium")),
    "fishleg": ('FishLeg, precision="highest"', fishleg(precision="highest")),
    "fishleg-dense": (
        'FishLeg, "highest", thin_gradients=False',
        fishleg(precision="highest", thin_gradients=False),
    ),
    "published": ("published, eager per layer", published),
}
if "thin_gradients" not in signature(FishLeg).parameters:
    del CONTESTANTS["fishleg-dense"]  # an older FishLeg: all of it is dense

# What one cycle of a contestant comes to, in ms.
FIGURES = {
    "whole": "whole step",
    "passes": "forward, backward",
    "step": "optimizer.step()",
    "theta": "of it θ",
    "ordinary": "ordinary θ step",
    "changing": "step where λ changes",
    "aux": "λ update",
    "anchor": "anchoring",
    "anchor step": "anchoring/step",
}
SPEED_UPS = {
    "theta": "θ step",
    "ordinary": "ordinary θ step",
    "aux": "λ update",
    "step": "optimizer.step()",
    "whole": "whole step",
}


class Race:
    """A contestant with a model of its own; cycle by cycle. Models and data, uniform noise, are the same for all."""

    def __init__(self, name: str, make_model: Callable[[], nn.Module], width: int, batch: int) -> None:
        torch.manual_seed(0)
        self.name = name
        self.batches = [torch.rand(batch, width) for _ in range(UPDATE_EVERY)]
        self.model, self.likelihood, self.clock = make_model().train(), BernoulliLikelihood(), Stopwatch()
        self.runner = CONTESTANTS[name][1](self.model, self.likelihood, self.clock)

    def cycle(self, steps: int) -> dict[str, float]:
        """So many training steps; the FIGURES, in ms. Those that the contestant lacks are nan."""
        passes, optimizing = [], []
        before = dict(self.clock.seconds)
        for i in range(steps):
            inputs = self.batches[i % len(self.batches)]
            start = time.perf_counter()
            self.runner.optimizer.zero_grad()
            loss = self.likelihood.nll(inputs, self.model(inputs))
            loss.backward()
            middle = time.perf_counter()
            self.runner.step(inputs)
            optimizing.append(time.perf_counter() - middle)
            passes.append(middle - start)
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"{self.name}: the loss is not finite, so that its times mean nothing")
        aux, anchor = (self.clock.seconds[share] - before[share] for share in ("aux", "anchor"))
        every = self.runner.anchor_every
        changing = [i % UPDATE_EVERY == 0 for i in range(steps)]
        ordinary = [t for i, t in enumerate(optimizing) if not changing[i] and (not every or i % every)]
        return {
            name: 1000 * seconds
            for name, seconds in {
                "whole": mean(passes) + mean(optimizing),
                "passes": mean(passes),
                "step": mean(optimizing),
                "theta": (sum(optimizing) - aux - anchor) / steps,
                "ordinary": median(ordinary),
                "changing": mean(t for t, c in zip(optimizing, changing, strict=True) if c) if aux else math.nan,
                "aux": aux / sum(changing) if aux else math.nan,
                "anchor": anchor / (steps // every) if every else math.nan,
                "anchor step": anchor / steps if every else math.nan,
            }.items()
        }

    def finish(self) -> None:
        """RuntimeError if steps were skipped: those cost less than they should."""
        if isinstance(self.runner.optimizer, FishLeg):
            counts = self.runner.optimizer.diagnostics()
            if counts["skipped_steps"] or counts["skipped_aux_steps"]:
                raise RuntimeError(f"{self.name} skipped steps, so that its times mean nothing")


Rounds = list[dict[str, float]]  # the figures of each round


def measure(races: Sequence[Race], rounds: int, title: str) -> tuple[list[Rounds], int]:
    """Each race's rounds that count, and the steps of a cycle."""
    steps = math.lcm(UPDATE_EVERY, *(race.runner.anchor_every or 1 for race in races))
    found: list[Rounds] = [[] for _ in races]
    for number in tqdm(range(WARM_UP + rounds), desc=title):
        for i in range(len(races)):
            turn = (number + i) % len(races)  # who goes first changes, and with it what the caches hold
            figures = races[turn].cycle(steps)
            if number >= WARM_UP:
                found[turn].append(figures)
    for race in races:
        race.finish()
    return found, steps


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Median and quartiles; None where there is nothing."""
    known = torch.tensor([v for v in values if not math.isnan(v)], dtype=torch.float64)
    if not len(known):
        return None
    low, middle, high = known.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def ratios(above: Rounds, below: Rounds, figure: str) -> dict[str, float] | None:
    """One contestant's figure over another's, round by round."""
    return spread(a[figure] / b[figure] for a, b in zip(above, below, strict=True))


def race_record(model: str, names: Sequence[str], batch: int, rounds: int) -> dict[str, Any]:
    """Every contestant on one model."""
    widths = WIDTHS[model]
    races = [Race(name, lambda: models.autoencoder(widths), widths[0], batch) for name in names]
    times, steps = measure(races, rounds, model)
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


def exponent(widths: Sequence[float], times: Sequence[float]) -> float:
    """k of time ∝ widthᵏ, by least squares of the logarithms."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (widths, times))
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())


def growth_record(names: Sequence[str], batch: int, rounds: int) -> dict[str, Any]:
    """FishLeg on one square Linear of growing width; all widths in every round, and an exponent of each round."""
    names = [n for n in names if n in GROWING]
    pairs = [(name, width) for name in names for width in GROWTH]
    linear = lambda width: nn.Sequential(nn.Linear(width, width))
    times, steps = measure([Race(n, lambda w=w: linear(w), w, batch) for n, w in pairs], rounds, "growth")
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


# ---- the report


def cell(value: dict[str, float] | None, unit: str = "", quartiles: bool = False) -> str:
    """Three digits of the median, and the quartiles where wanted."""
    if value is None:
        return ""
    three = lambda x: f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"
    text = three(value["median"]) + unit
    return text + (f" ({three(value['low'])} to {three(value['high'])})" if quartiles else "")


def race_text(record: dict[str, Any]) -> list[str]:
    """The two tables of one model."""
    entries = record["contestants"].values()
    header = ["ms", FIGURES["whole"], "over AdamW's", *list(FIGURES.values())[1:]]
    rows = [
        [e["label"], cell(e["whole"]), cell(e["to adamw"], "×", True), *(cell(e[f]) for f in list(FIGURES)[1:])]
        for e in entries
    ]
    lines = [table(header, rows)]
    faster = [e for e in entries if "speed-up" in e]
    if faster:
        kinds = list(faster[0]["speed-up"])
        rows = [[e["label"], *(cell(e["speed-up"][k], "×", True) for k in kinds)] for e in faster]
        lines += ["", table(["faster than the published way", *kinds], rows)]
    return lines


def growth_text(record: dict[str, Any]) -> list[str]:
    """Time over width, one row for each contestant and figure."""
    names = {"ordinary": "ordinary θ step", "step": "optimizer.step(), amortised", "passes": "forward, backward"}
    header = ["ms at width", *map(str, record["widths"]), "exponent", "of the last two"]
    rows = [
        [f"{e['label']}: {text}", *map(cell, e[f]["ms"]), *(cell(e[f][k], "", True) for k in ("exponent", "last two"))]
        for e in record["contestants"].values()
        for f, text in names.items()
    ]
    return [table(header, rows)]


def write(records: dict[str, dict[str, Any]], path: Path) -> str:
    """Write the results (.json) and their tables (.md); returns the tables."""
    lines = [
        "# What a training step costs",
        "",
        "Times in ms, medians over rounds in which the contestants take turns; ratios are taken within each round,",
        "quartiles in brackets. A round is one cycle of each contestant. FishLeg has its defaults but where one is",
        "named: λ is updated every 10 steps, on 32 samples. Made by `make bench`.",
        "",
        "- whole step: zero_grad, forward, backward, optimizer.step(); its mean over the cycle: everything amortised.",
        "- optimizer.step(): its mean over the cycle. *Of it θ*: that mean without λ updates and anchoring, so with",
        "  what follows from a change of λ. *Ordinary θ step*: the median of the calls in which λ does not change.",
        "- step where λ changes: optimizer.step() with λ update, and anchoring where it falls in the same step.",
        "- λ update and anchoring: one call of each alone. *Anchoring/step*: spread over the cycle.",
        "- faster than the published way: its time over ours: *θ step* by *of it θ*, the others by their own columns.",
        "- exponent: k of time ∝ widthᵏ, one square Linear with bias: least squares in the logarithms, over all widths",
        "  and over the last two, where what does not grow with the width weighs less.",
    ]  # fmt: skip
    for record in records.values():
        name = record["model"] if record["model"] == "growth" else "-".join(map(str, record["widths"])) + " and back"
        versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
        lines += ["", f"## {name}, batch {record['batch']}", ""]
        lines += growth_text(record) if record["model"] == "growth" else race_text(record)
        lines += ["", f"{record['cpu']}, {record['threads']} threads, machine's load before {record['load before']}. "
                  f"{versions}. {record['date']}, "
                  f"{record['rounds']} rounds of {record['cycle']} steps: `{record['command']}`"]  # fmt: skip
    text = "\n".join(lines) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    path.with_suffix(".md").write_text(text)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=[*WIDTHS, "growth", "all"], default="all")
    parser.add_argument("--batch", type=positive, default=100)
    parser.add_argument("--rounds", type=positive, default=15, help=f"that count; {WARM_UP} more go before them")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's)")
    parser.add_argument("--only", type=lambda t: t.split(","), default=list(CONTESTANTS), help=",".join(CONTESTANTS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="results, .json; the tables go beside it")
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
            else race_record(model, names, args.batch, args.rounds)
        )
        flags = f"--model {model} --batch {args.batch} --rounds {args.rounds} --threads {torch.get_num_threads()}"
        flags += f" --only {','.join(args.only)}" * (len(names) < len(CONTESTANTS))
        record |= {
            "cpu": cpu_name(), "threads": torch.get_num_threads(), "load before": load,
            "date": date.today().isoformat(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "fishleg_fast": __version__},
            "command": f"python benchmarks/step_time.py {flags}",
        }  # fmt: skip
        records[f"{model}, batch {args.batch}"] = record
        text = write(records, args.out)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
