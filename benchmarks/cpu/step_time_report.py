"""The tables of step times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common.tables import table
from benchmarks.cpu.summary import cell

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


def comparison_text(record: dict[str, Any]) -> list[str]:
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
        lines += growth_text(record) if record["model"] == "growth" else comparison_text(record)
        lines += ["", f"{record['cpu']}, {record['threads']} threads, machine's load before {record['load before']}. "
                  f"{versions}. {record['date']}, "
                  f"{record['rounds']} rounds of {record['cycle']} steps: `{record['command']}`"]  # fmt: skip
    text = "\n".join(lines) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    path.with_suffix(".md").write_text(text)
    return text
