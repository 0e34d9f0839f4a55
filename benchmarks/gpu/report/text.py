"""OUT/gpu.json as text: its tables, and what is to be known of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.common.tables import table
from benchmarks.gpu.report.lookup import OPPONENTS, TIMINGS, Data, compiled, floor, ms, sizes
from benchmarks.gpu.report.targets import targets
from benchmarks.gpu.shapes import LISTS

OPS = {"qv": "Q v", "refresh": "P and S refreshed", "theta_step": "θ step (op)", "lambda_step": "λ step (op)"}
TITLE = "# Kernels and steps on a GPU"
REHEARSAL = "REHEARSAL on a CPU with tiny shapes: no figure below says anything about any device."

NOTES = """\
ms are medians, quartiles in brackets. Contestants are measured one after another.

- eager call: calls back to back, the host's time where it is the longer; the L2 cache as the call before left it.
- device alone: replays of a CUDA graph with the L2 cache flushed before each. *: it could not be captured; single
  calls after a flush.
- compiled: the same maths as plain functions under torch.compile, and with torch's own CUDA graphs; where it is
  compared, the faster of the two. Its operands are bfloat16 beside medium, and float32 beside tf32x3.
- floor: the bytes at the copy's speed or the FLOPs at torch.mm's, whichever takes longer.
- published: per layer, with Q from λ itself at every step; for models of Linears only."""


def number(x: float | None) -> str:
    """Three digits."""
    return "" if x is None else f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def cell(result: Data | None, timing: str) -> str:
    """Median and quartiles of a timing in ms, or what is there instead."""
    if result is None:
        return ""
    if "error" in result:
        return "error"
    times = result.get(timing)
    if times is None:
        return ""
    text = f"{number(times['median'])} ({number(times['low'])} to {number(times['high'])})"
    return text + "*" * (times.get("how") == "calls")


def _targets_text(data: Data) -> list[str]:
    verdict = {True: "yes", False: "NO", None: "not measured"}
    rows = [
        [t["target"], t["backend"], t["precision"], TIMINGS[t["timing"]],
         "" if t["value"] is None else f"{number(t['value'])} at {t['at']}", t["measured"],
         "rehearsed" if data.get("rehearsal") and t["met"] is not None else verdict[t["met"]]]
        for t in targets(data)
        if t["value"] is not None or t["timing"] == "call"
    ]  # fmt: skip
    if not rows:
        return ["None to judge: no backend but the reference was available."]
    return [table(["target", "backend", "precision", "timing", "worst value", "sizes", "met"], rows)]


def _rows(data: Data, kind: str, extra: Callable[[str, str, str], list[str]]) -> Iterator[list[str]]:
    for size in sizes(data, kind):
        for key, result in data["results"].items():
            if not key.startswith(f"{kind}/{size}/"):
                continue
            name, precision = key.split("/")[2:]
            launches = str(result.get("kernels", ""))
            cells = [cell(result, timing) for timing in TIMINGS]
            yield [size, name, "" if name == "adamw" else precision, *cells, launches, *extra(size, name, precision)]


def _op_text(data: Data, op: str) -> list[str]:
    def extra(size: str, name: str, precision: str) -> list[str]:
        found = []
        for timing in TIMINGS:
            mine, theirs = ms(data, op, size, name, precision, timing), compiled(data, op, size, precision, timing)
            own = name in OPPONENTS or not mine or not theirs
            found.append("" if own else f"{number(theirs / mine)}×")
        least, alone = floor(data, op, size, precision), ms(data, op, size, name, precision, "device")
        return [*found, number(least), f"{number(alone / least)}×" if alone and least else ""]

    rows = list(_rows(data, op, extra))
    header = ["d or list", "by", "precision", "eager call, ms", "device alone, ms", "launches",
              "compiled/it, eager", "compiled/it, device", "floor, ms", "device/floor"]  # fmt: skip
    return [f"## {OPS[op]}", "", table(header, rows), ""] if rows else []


def _theta_text(data: Data) -> list[str]:
    def extra(model: str, name: str, precision: str) -> list[str]:
        found = []
        for other in ("adamw", "published"):
            for timing in TIMINGS:
                a, b = (ms(data, "theta", model, n, precision, timing) for n in (name, other))
                found.append(
                    "" if not a or not b or name == other else f"{number(a / b if other == 'adamw' else b / a)}×"
                )
        return found

    rows = list(_rows(data, "theta", extra))
    header = ["model", "by", "precision", "eager call, ms", "device alone, ms", "launches", "over AdamW, eager",
              "over AdamW, device", "published/it, eager", "published/it, device"]  # fmt: skip
    return ["## θ step of whole models, λ unchanged", "", table(header, rows), ""] if rows else []


def _train_text(data: Data) -> list[str]:
    figures = {
        "whole": "whole step", "passes": "forward, backward", "step": "step()", "ordinary": "ordinary θ step",
        "aux": "λ update", "anchor": "anchoring",
    }  # fmt: skip
    rows = []
    for model in sizes(data, "train"):
        base = data["results"].get(f"train/{model}/adamw/highest", {}).get("whole")
        for key, result in data["results"].items():
            if key.startswith(f"train/{model}/"):
                name, precision = key.split("/")[2:]
                whole = result.get("whole")
                ratio = f"{number(whole['median'] / base['median'])}×" if whole and base else ""
                cells = [cell(result, "whole"), *(cell(result, f).split(" ")[0] for f in list(figures)[1:])]
                theirs = None if name == "adamw" else ms(data, "train", model, "published", precision, "whole")
                faster = f"{number(theirs / whole['median'])}×" if whole and theirs and name != "published" else ""
                rows.append([model, name, "" if name == "adamw" else precision, *cells, ratio, faster])
    header = [
        "model",
        "by",
        "precision",
        *(f"{text}, ms" for text in figures.values()),
        "whole over AdamW's",
        "published's over it",
    ]
    return (
        ["## Training steps, λ updates and anchoring amortised over 10 steps", "", table(header, rows), ""]
        if rows
        else []
    )


def _check_text(data: Data) -> list[str]:
    rows = []
    for key, r in data["results"].items():
        if key.startswith("check/"):
            errors = r.get("errors", {})
            shown = [("not finite" if errors[q] is None else f"{errors[q]:.1e}") if q in errors else "" for q in
                     ("refresh", "qv", "inner", "lambda_step", "theta_step", "spectral")]  # fmt: skip
            verdict = "error" if "error" in r else "yes" if r["right"] else "NO"
            rows.append([*key.split("/")[1:], *shown, f"{r['limit']:.0e}" if "limit" in r else "", verdict])
    header = ["structure", "backend", "precision", "P, S", "Q v", "⟨x, y⟩", "change of λ", "change of θ",
              "spectral", "limit", "right"]  # fmt: skip
    return [table(header, rows)] if rows else ["Not checked."]


def _peak_text(data: Data) -> list[str]:
    rows = []
    for key, r in data["results"].items():
        if key.startswith("peak/"):
            speed = "error" if "error" in r else ""
            if "bytes/s" in r:
                speed = f"{r['bytes/s'] / 1e9:.0f} GB/s"
            if "flop/s" in r:
                speed = f"{r['flop/s'] / 1e12:.3g} TFLOP/s"
            rows.append([key.removeprefix("peak/"), speed])
    return [table(["", "measured"], rows)] if rows else ["Not measured."]


def _reach_text(data: Data) -> list[str]:
    """How near to their floors the kernels can come by counts, on a card whose peaks are known."""
    from benchmarks.gpu import reach  # which needs the package, as no other table does

    device = str(data.get("environment", {}).get("device", ""))
    card = next((c for name, c in reach.CARDS.items() if name in device), None)
    if card is None:
        return []
    header = ["list", "kernel", "floor, µs", "by counts, µs", "reach", "what takes it"]
    found = [[name, *row] for name, shapes in LISTS.items() for row in reach.rows(shapes, "tf32", card)]
    return ["## What the Triton kernels can reach at TF32, by counts", "", table(header, found), ""]


def _head_text(data: Data) -> list[str]:
    """Where, when and how it was measured; the backends, the build and the tests."""
    env, tests, build = data.get("environment", {}), data.get("tests", {}), data.get("build", {})
    shown = {k: env[k] for k in ("device", "driver", "cuda", "torch", "triton", "python", "fishleg_fast") if k in env}
    backends = [f"- {n}: {'available' if b['available'] else 'UNAVAILABLE'}, {b['why']}"
                for n, b in env.get("backends", {}).items()]  # fmt: skip
    return [
        *([f"**{REHEARSAL}**", ""] if data.get("rehearsal") else []),
        ", ".join(f"{k} {v}" for k, v in shown.items()) + ".",
        f"{data.get('date', '')}, commit {data.get('commit', 'unknown')}: `{data.get('command', '')}`"
        + (f", {data['seconds']} s." if "seconds" in data else ", under way or cut off."),
        "",
        *backends,
        f"- extension: {'built' if build.get('built') else build.get('why', 'not yet built')}",
        f"- pytest -m gpu: {tests.get('verdict', 'not yet run')}. {tests.get('summary', '')}",
        *(f"    {line}" for line in tests.get("failures", [])),
    ]


def render(data: Data) -> str:
    """Everything as text (markdown, readable as it stands)."""
    lines = [
        TITLE,
        "",
        *_head_text(data),
        "",
        "## Targets",
        "",
        *_targets_text(data),
        "",
        "## Correctness: largest relative error against float64",
        "",
        *_check_text(data),
        "",
        "## What the device does",
        "",
        *_peak_text(data),
        "",
        *NOTES.splitlines(),
        "",
        *_theta_text(data),
        *_train_text(data),
        *(line for op in OPS for line in _op_text(data, op)),
        *_reach_text(data),
    ]
    kinds = ("error", "capture error", "launches error")
    errors = [f"- {key}: {r[kind]}" for key, r in data["results"].items() for kind in kinds if kind in r]
    for title, found in {
        "What failed": errors,
        "What ended a process": [f"- {t}" for t in data.get("troubles", [])],
        "What there was no time for": [f"- {key}" for key in data.get("unmeasured", [])],
    }.items():
        if found:
            lines += [f"## {title}", "", *found, ""]
    return "\n".join(lines).rstrip() + "\n"
