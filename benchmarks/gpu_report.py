"""The tables and targets of OUT/gpu.json. Needs neither torch nor a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from gpu_shapes import LISTS, REFERENCE, TALLEST, TINY_LISTS, WIDEST_TARGET, cost
from tables import table

Data = dict[str, Any]
TIMINGS = {"call": "eager calls", "device": "device alone"}
OPPONENTS = ("adamw", "published", "compiled", "compiled-graphs", "mm")
OPS = {"qv": "Q v", "refresh": "P and S refreshed", "theta_step": "θ step (op)", "lambda_step": "λ step (op)"}
# precision of ours -> that of an opponent, where torch has not the same
PEERS = {"tf32x3": ("tf32x3", "highest"), "medium": ("medium", "high")}
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


def failed(data: Data) -> bool:
    """Whether a correctness check or a test failed, a check could not be run, or none was where all should be."""
    checks = [r for key, r in data["results"].items() if key.startswith("check/")]
    missing = not checks and not data.get("only")
    return missing or bool(data.get("tests", {}).get("failed")) or not all(r.get("right") for r in checks)


def names(data: Data) -> list[str]:
    """Backends that are available on the device."""
    known = data.get("environment", {}).get("backends", {})
    return [name for name, state in known.items() if state["available"]]


def ms(data: Data, kind: str, size: str, name: str, precision: str, timing: str) -> float | None:
    """A median in ms; None where there is none. A peer's is of the precision nearest to ours."""
    wanted = ("highest",) if name == "adamw" else (precision,)
    if name in (*OPPONENTS[1:], "reference"):
        wanted = PEERS.get(precision, wanted)
    for p in wanted:
        times = data["results"].get(f"{kind}/{size}/{name}/{p}", {}).get(timing)
        if times:
            return times["median"]
    return None


def compiled(data: Data, op: str, size: str, precision: str, timing: str) -> float | None:
    """The faster one of the compiled opponents."""
    found = [ms(data, op, size, name, precision, timing) for name in ("compiled", "compiled-graphs")]
    return min((x for x in found if x is not None), default=None)


def sizes(data: Data, kind: str) -> list[str]:
    """The sizes (or models) of a kind of measurement, in the order measured; numbers first, ascending."""
    found = list(dict.fromkeys(key.split("/")[1] for key in data["results"] if key.startswith(f"{kind}/")))
    return sorted((s for s in found if s.isdigit()), key=int) + [s for s in found if not s.isdigit()]


def precisions(data: Data, kind: str, size: str | None = None) -> list[str]:
    """The precisions of a kind of measurement."""
    start = f"{kind}/" if size is None else f"{kind}/{size}/"
    return list(dict.fromkeys(key.rsplit("/", 1)[1] for key in data["results"] if key.startswith(start)))


# ---- targets


def targets(data: Data) -> list[Data]:
    """The issue's targets for every backend, precision and timing: the value, at its worst size, and whether met."""
    ours = [n for n in names(data) if n != "reference" or data.get("rehearsal")]
    found: list[Data] = []

    def planned(name: str, kind: str, size: str | None = None) -> list[str]:
        return [p for p in precisions(data, kind, size) if name != "reference" or REFERENCE[p] == p]

    def judge(text: str, at_least: bool, limit: float, values: dict[str, float | None], how: tuple[str, ...]) -> None:
        known = {k: v for k, v in values.items() if v is not None}
        worst = (min if at_least else max)(known, key=lambda k: known[k]) if known else None
        value = None if worst is None else known[worst]
        complete = len(known) == len(values)
        met = None if value is None else (value >= limit if at_least else value <= limit)
        met = None if met and not complete else met  # what is missing might not
        found.append(
            {"target": text, "limit": limit, "backend": how[0], "precision": how[1], "timing": how[2],
             "value": value, "at": worst, "measured": f"{len(known)} of {len(values)}", "met": met}
        )  # fmt: skip

    def over(a: float | None, b: float | None) -> float | None:
        return None if a is None or not b else a / b

    squares = [s for s in sizes(data, "qv") if s.isdigit()]
    tall = [s for s in sizes(data, "refresh") if s.isdigit() and (int(s) >= TALLEST or data.get("rehearsal"))]
    for name in ours:
        for timing in TIMINGS:
            for p in planned(name, "theta", "mnist"):
                mine, how = ms(data, "theta", "mnist", name, p, timing), (name, p, timing)
                theirs = lambda peer, p=p, timing=timing: ms(data, "theta", "mnist", peer, p, timing)
                judge("θ step of the MNIST autoencoder over fused AdamW's: at most 3", False, 3.0,
                      {"mnist": over(mine, theirs("adamw"))}, how)  # fmt: skip
                judge("published per-layer way's θ step over it, at its precision: at least 20", True, 20.0,
                      {"mnist": over(theirs("published"), mine)}, how)  # fmt: skip
                if p not in ("highest", "tf32x3"):
                    float32 = ms(data, "theta", "mnist", "published", "highest", timing)
                    judge("published per-layer way's θ step, in float32 as it comes, over it: at least 20", True, 20.0,
                          {"mnist": over(float32, mine)}, how)  # fmt: skip
            for p in planned(name, "qv"):
                how = (name, p, timing)
                ratio = {
                    s: over(compiled(data, "qv", s, p, timing), ms(data, "qv", s, name, p, timing)) for s in squares
                }
                narrow = {s: r for s, r in ratio.items() if int(s) <= WIDEST_TARGET}
                judge(
                    f"compiled reference's Q v over it, every d ≤ {WIDEST_TARGET}: at least 2", True, 2.0, narrow, how
                )
                judge("compiled reference's Q v over it, every d: at least 0.95", True, 0.95, ratio, how)
            for p in planned(name, "refresh"):
                ratio = {
                    s: over(ms(data, "refresh", s, "mm", p, timing), ms(data, "refresh", s, name, p, timing))
                    for s in tall
                }
                judge(f"torch.mm's RᵀR and LLᵀ over a refresh, d ≥ {TALLEST}: at least 1.5", True, 1.5, ratio,
                      (name, p, timing))  # fmt: skip
    return found


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


# ---- text


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


def floor(data: Data, op: str, size: str, precision: str) -> float | None:
    """ms that the bytes or the FLOPs take at the least, at the speeds measured; None where these are missing."""
    lists = TINY_LISTS if data.get("rehearsal") else LISTS
    flops, bytes_ = cost(op, [(int(size), int(size))] if size.isdigit() else lists[size])
    bandwidth = data["results"].get("peak/copy", {}).get("bytes/s")
    peak = data["results"].get(f"peak/gemm/{precision}", {}).get("flop/s")
    return 1000 * max(bytes_ / bandwidth, flops / peak) if bandwidth and peak else None


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
                     ("refresh", "qv", "lambda", "theta")]  # fmt: skip
            verdict = "error" if "error" in r else "yes" if r["right"] else "NO"
            rows.append([*key.split("/")[1:], *shown, f"{r['limit']:.0e}" if "limit" in r else "", verdict])
    header = ["structure", "backend", "precision", "P, S", "Q v", "change of λ", "change of θ", "limit", "right"]
    return [table(header, rows)] if rows else ["Not checked."]


def render(data: Data) -> str:
    """Everything as text (markdown, readable as it stands)."""
    env, results = data.get("environment", {}), data["results"]
    backends = [f"- {n}: {'available' if b['available'] else 'UNAVAILABLE'}, {b['why']}"
                for n, b in env.get("backends", {}).items()]  # fmt: skip
    tests, build = data.get("tests", {}), data.get("build", {})
    shown = {k: env[k] for k in ("device", "driver", "cuda", "torch", "triton", "python", "fishleg_fast") if k in env}
    lines = [TITLE, ""]
    if data.get("rehearsal"):
        lines += [f"**{REHEARSAL}**", ""]
    lines += [
        ", ".join(f"{k} {v}" for k, v in shown.items()) + ".",
        f"{data.get('date', '')}, commit {data.get('commit', 'unknown')}: `{data.get('command', '')}`"
        + (f", {data['seconds']} s." if "seconds" in data else ", under way or cut off."),
        "",
        *backends,
        f"- extension: {'built' if build.get('built') else build.get('why', 'not yet built')}",
        f"- pytest -m gpu: {tests.get('verdict', 'not yet run')}. {tests.get('summary', '')}",
        *(f"    {line}" for line in tests.get("failures", [])),
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
    ]
    kinds = ("error", "capture error", "launches error")
    errors = [f"- {key}: {r[kind]}" for key, r in results.items() for kind in kinds if kind in r]
    for title, found in {
        "What failed": errors,
        "What ended a process": [f"- {t}" for t in data.get("troubles", [])],
        "What there was no time for": [f"- {key}" for key in data.get("unmeasured", [])],
    }.items():
        if found:
            lines += [f"## {title}", "", *found, ""]
    return "\n".join(lines).rstrip() + "\n"


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
