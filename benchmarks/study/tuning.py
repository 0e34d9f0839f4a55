"""Which lr is best, and which runs it takes to know: pure functions of the records that are there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.study.entries import ENTRIES, is_fishleg
from benchmarks.study.problems import PROBLEMS

TUNING_SEEDS = (0, 1, 2)
REPORT_SEEDS = (3, 4, 5, 6, 7)
WIDEST = 40.0  # a search goes no further beyond its first grid than by this factor

Figures = dict[float, dict[int, float]]  # lr -> seed -> figure, infinite where the run diverged


def rounded(lr: float) -> float:
    """An lr as records have it: six digits, so that 0.015/3 is 0.005."""
    return float(f"{lr:.6g}")


def figure(record: dict[str, Any]) -> float:
    """What the record's problem is judged by; lower is better."""
    value = record[PROBLEMS[record["problem"]].figure]
    return math.inf if value is None else value


def figures(records: Iterable[dict[str, Any]], problem: str, optimizer: str, seeds: Sequence[int]) -> Figures:
    """The figures of an optimizer's runs with these seeds, by lr from low to high."""
    found: Figures = {}
    ours = [r for r in records if (r["problem"], r["optimizer"]) == (problem, optimizer) and r["seed"] in seeds]
    for r in sorted(ours, key=lambda r: (r["lr"], r["seed"])):
        if r["steps"] == PROBLEMS[problem].steps:
            found.setdefault(r["lr"], {})[r["seed"]] = figure(r)
    return found


def mean(values: Iterable[float]) -> float:
    """The mean, infinite if any run diverged or there is none."""
    known = list(values)
    return sum(known) / len(known) if known else math.inf


def best_lr(found: Figures) -> float:
    """The lr of the lowest mean, among those with the most seeds."""
    most = max(len(by_seed) for by_seed in found.values())
    full = {lr: by_seed for lr, by_seed in found.items() if len(by_seed) == most}
    return min(full, key=lambda lr: mean(full[lr].values()))


def at_edge(found: Figures) -> bool:
    """Whether the best lr is the lowest or the highest one tried, so that the true best may lie beyond."""
    return best_lr(found) in (min(found), max(found))


def beyond(lr: float, lrs: Sequence[float]) -> float:
    """The next lr outward from one at the edge, at the ratio of the edge's last two."""
    ratio = min(b / a for a, b in pairwise(sorted(lrs)))
    return rounded(lr / ratio if lr == min(lrs) else lr * ratio)


def next_runs(found: Figures, grid: Sequence[float], seeds: Sequence[int], margin: float) -> list[tuple[float, int]]:
    """The runs (lr, seed) that tuning needs next; none when it is done.

    First the grid with the first seed, wider until the best lies inside; then the other seeds at every lr that
    was close to the best. Where their mean moves the best to an edge, the search goes on there.
    """
    grid = [rounded(lr) for lr in grid]
    if missing := [(lr, seeds[0]) for lr in grid if seeds[0] not in found.get(lr, {})]:
        return missing
    first = {lr: {seeds[0]: by_seed[seeds[0]]} for lr, by_seed in found.items() if seeds[0] in by_seed}
    for so_far in (first, found):
        if at_edge(so_far) and len(so_far) > 1:
            further = beyond(best_lr(so_far), list(so_far))
            if min(grid) / WIDEST < further < max(grid) * WIDEST:
                return [(further, seeds[0])]
    lowest = first[best_lr(first)][seeds[0]]
    close = [lr for lr, by_seed in first.items() if by_seed[seeds[0]] <= (1 + margin) * lowest]
    return [(lr, seed) for seed in seeds for lr in close if seed not in found[lr]]


def tuned_lr(records: Iterable[dict[str, Any]], problem: str, optimizer: str) -> float | None:
    """The best lr of the tuning seeds; FishLeg's own for a variation that was not tuned."""
    records = list(records)
    found = figures(records, problem, optimizer, TUNING_SEEDS)
    if not found and is_fishleg(optimizer) and optimizer != "fishleg":
        found = figures(records, problem, "fishleg", TUNING_SEEDS)
    return best_lr(found) if found else None


def chosen(records: Iterable[dict[str, Any]], problem: str, family: str) -> str:
    """The row of a family that was best in tuning."""
    records = list(records)

    def lowest(name: str) -> float:
        found = figures(records, problem, name, TUNING_SEEDS)
        return mean(found[best_lr(found)].values()) if found else math.inf

    return min((name for name, entry in ENTRIES.items() if entry.family == family), key=lowest)
