"""The convergence study's report: its tables (markdown) and plot."""

from __future__ import annotations

from pathlib import Path
from statistics import stdev
from typing import Any

import torch

from benchmarks.common.optimizers import OPTIMIZERS
from benchmarks.common.plots import COLOURS, loss_axis, pyplot, smooth
from benchmarks.common.tables import number, table
from benchmarks.study.convergence import FACTORS
from benchmarks.study.entries import is_fishleg
from benchmarks.study.problems import PROBLEMS
from benchmarks.study.tuning import (
    REPORT_SEEDS,
    TUNING_SEEDS,
    Figures,
    at_edge,
    best_lr,
    figure,
    figures,
    mean,
    rounded,
    tuned_lr,
)

Records = list[dict[str, Any]]

INTRODUCTION = f"""# Convergence on four problems

Every optimizer takes the same steps. The lr is the one of the lowest mean over seeds {TUNING_SEEDS[0]} to \
{TUNING_SEEDS[-1]}; the first tables are of
seeds {REPORT_SEEDS[0]} to {REPORT_SEEDS[-1]}, which took no part in that choice. No weight decay; lr falls to 0 along \
half a cosine, on the GPT after a
rise over 20 steps. A seed decides the initial parameters and the order of the data. *CURVES*: the autoencoder
784-400-200-100-50-25-6 and back, ReLU, He initialisation, 18,000 training images; NLL is a sum over an image's
pixels. *GPT*: four layers of width 128 on windows of 128 bytes; NLL per byte. *ResNet18*: first stage of 16
channels, 1,500 images of 8×8. Final NLL are means over the training set after the last step (on the GPT,
over 512 windows spread evenly over the set: "test NLL" likewise). One thread, beside other work: hence CPU time,
which such work lengthens too; that of different processors does not compare. Made by
`python -m benchmarks.study.convergence --report`."""


def each(values: dict[int, float]) -> str:
    """The figure of each seed."""
    return ", ".join(number(v) for v in values.values())


def reported(records: Records, problem: str) -> dict[str, Records]:
    """Optimizer -> its runs with the reporting seeds at the lr that tuning chose."""
    groups: dict[str, Records] = {}
    for optimizer in OPTIMIZERS:
        lr = tuned_lr(records, problem, optimizer)
        runs = [
            r
            for r in records
            if (r["problem"], r["optimizer"], r["lr"]) == (problem, optimizer, lr)
            and r["seed"] in REPORT_SEEDS
            and r["steps"] == PROBLEMS[problem].steps
        ]
        if runs:
            groups[optimizer] = sorted(runs, key=lambda r: r["seed"])
    return groups


def verdict(mine: Records, peer: Records) -> tuple[str, str]:
    """FishLeg's mean over a peer's, of the seeds that both have; and in words where the peer is better."""
    a, b = ({r["seed"]: figure(r) for r in runs} for runs in (mine, peer))
    if not (common := sorted(set(a) & set(b))):
        return "", ""
    ratio = mean(a[s] for s in common) / mean(b[s] for s in common)
    wins = sum(b[s] < a[s] for s in common)
    words = f"BETTER THAN FISHLEG, with {wins} of {len(common)} seeds" if ratio > 1 else ""
    return number(ratio), words or (f"better with {wins} of {len(common)} seeds" if wins else "")


def main_table(groups: dict[str, Records]) -> str:
    """The reporting seeds: who ends how low."""
    rows = []
    for optimizer, runs in groups.items():
        values = {r["seed"]: figure(r) for r in runs}
        ratio, words = ("", "") if is_fishleg(optimizer) else verdict(groups.get("fishleg", []), runs)
        cpu = sum(r["cpu seconds"] for r in runs) / sum(r["steps done"] for r in runs)
        spread = stdev(values.values()) if len(values) > 1 else 0.0
        tests = [r["test nll"] for r in runs]
        rows.append(
            [
                OPTIMIZERS[optimizer].label, f"{runs[0]['lr']:g}", number(mean(values.values())),
                f"{spread:.2g}", each(values), number(None if None in tests else mean(tests)),
                f"{1000 * cpu:.0f}", ", ".join(sorted({r["cpu"].split(" ")[0] for r in runs})), ratio, words,
            ]
        )  # fmt: skip
    header = ["optimizer", "lr", "mean", "standard deviation", "of each seed", "test NLL", "CPU ms/step", "CPU"]
    return table([*header, "FishLeg's mean / its mean", ""], rows)


def edge_note(found: Figures) -> str:
    """What the best lr's row says."""
    if len(found) == 1:
        return "the only one tried"
    return "best, AT THE EDGE of what was tried" if at_edge(found) else "best"


def tuning_table(records: Records, problem: str) -> str:
    """All lr of all optimizers with the tuning seeds."""
    rows = []
    for optimizer in OPTIMIZERS:
        if found := figures(records, problem, optimizer, TUNING_SEEDS):
            best = best_lr(found)
            for lr, values in found.items():
                note = edge_note(found) if lr == best else ""
                rows.append([OPTIMIZERS[optimizer].label, f"{lr:g}", number(mean(values.values())), each(values), note])
    return table(["optimizer", "lr", "mean", "of each seed", ""], rows)


def robustness_table(records: Records, problem: str) -> str:
    """FishLeg at its best lr and at multiples of it, with the reporting seeds; empty without such runs."""
    rows = []
    for optimizer in OPTIMIZERS:
        best = tuned_lr(records, problem, optimizer)
        found = figures(records, problem, optimizer, REPORT_SEEDS)
        if best not in found or len(found) == 1:
            continue
        for factor in sorted((*FACTORS, 1.0)):
            if values := found.get(rounded(best * factor)):
                common = [s for s in values if s in found[best]]
                ratio = mean(values[s] for s in common) / mean(found[best][s] for s in common)
                rows.append(
                    [
                        OPTIMIZERS[optimizer].label, f"{factor:.2g}", f"{best * factor:g}",
                        number(mean(values.values())), each(values), number(ratio),
                    ]
                )  # fmt: skip
    if not rows:
        return ""
    return table(["optimizer", "of its best lr", "lr", "mean", "of each seed", "mean / mean at its best lr"], rows)


def plot_study(groups: dict[str, dict[str, Records]], path: Path) -> None:
    """Training loss over steps at each optimizer's best lr: mean over the seeds, and their range."""
    plt = pyplot()
    figure, panels = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")
    for axes, (problem, by_optimizer) in zip(panels.flat, groups.items(), strict=False):
        for optimizer, runs in by_optimizer.items():
            whole = [r for r in runs if None not in r["losses"] and r["steps done"] == r["steps"]]
            if not whole:
                continue
            losses = torch.tensor([smooth(r["losses"], 5) for r in whole])
            steps = torch.linspace(0, whole[0]["steps"], losses.shape[1] + 1)[1:]
            label = f"{OPTIMIZERS[optimizer].label}, lr {runs[0]['lr']:g}"
            axes.plot(steps, losses.mean(0), COLOURS[optimizer], label=label, linewidth=1.3)
            axes.fill_between(steps, losses.amin(0), losses.amax(0), color=COLOURS[optimizer], alpha=0.2, linewidth=0)
        axes.set(xlabel="steps", ylabel="training NLL of the batch", title=PROBLEMS[problem].title)
        loss_axis(axes)
        if by_optimizer:
            axes.legend(fontsize=8)
    for axes in panels.flat[len(groups) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_study(records: Records, results: Path) -> str:
    """Write the study's tables (.md) and plot (.png) beside the results; returns the tables' text."""
    if not records:
        raise SystemExit(f"{results} has no runs yet: call without --report first.")
    there = [name for name in PROBLEMS if any(r["problem"] == name for r in records)]
    lines = [
        INTRODUCTION,
        "",
        f"Processor: {', '.join(sorted({r['cpu'] for r in records}))}. "
        + ", ".join(sorted({f"{k} {v}" for r in records for k, v in r["versions"].items()})) + ".",
    ]  # fmt: skip
    groups = {problem: reported(records, problem) for problem in there}
    for problem in there:
        setting = PROBLEMS[problem]
        lines += ["", f"## {setting.title}", "", f"{setting.steps} steps; figures: {setting.figure_name}.", ""]
        if groups[problem]:
            lines += [main_table(groups[problem]), ""]
        if robust := robustness_table(records, problem):
            lines += ["Other learning rates, the same seeds:", "", robust, ""]
        lines += [f"Tuning, seeds {', '.join(map(str, TUNING_SEEDS))}:", "", tuning_table(records, problem)]
    plot_study(groups, results.with_suffix(".png"))
    lines += [
        "",
        f"![Training NLL over steps, at each optimizer's best lr]({results.with_suffix('.png').name})",
        "",
    ]
    text = "\n".join(lines)
    results.with_suffix(".md").write_text(text)
    return text
