"""What is to be reached: whether the checks were right, and the targets of speed."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu.report.lookup import TIMINGS, Data, compiled, ms, names, precisions, sizes
from benchmarks.gpu.shapes import REFERENCE, TALLEST, WIDEST_TARGET


def failed(data: Data) -> bool:
    """Whether a correctness check or a test failed, a check could not be run, or none was where all should be."""
    checks = [r for key, r in data["results"].items() if key.startswith("check/")]
    missing = not checks and not data.get("only")
    return missing or bool(data.get("tests", {}).get("failed")) or not all(r.get("right") for r in checks)


def targets(data: Data) -> list[Data]:
    """The targets for every backend, precision and timing: the value, at its worst size, and whether met."""
    ours = [n for n in names(data) if n != "reference" or data.get("rehearsal")]
    return [
        target
        for name in ours
        for timing in TIMINGS
        for kind in (_theta_targets, _product_targets, _refresh_targets)
        for target in kind(data, name, timing)
    ]


def _theta_targets(data: Data, name: str, timing: str) -> Iterator[Data]:
    """A θ step of the MNIST autoencoder beside AdamW's and the published way's."""
    for p in _measured(data, name, "theta", "mnist"):
        time = lambda by, precision=p: ms(data, "theta", "mnist", by, precision, timing)
        mine, how = time(name), (name, p, timing)
        yield _judge("θ step of the MNIST autoencoder over fused AdamW's: at most 3", False, 3.0,
                     {"mnist": _over(mine, time("adamw"))}, how)  # fmt: skip
        yield _judge("published per-layer way's θ step over it, at its precision: at least 20", True, 20.0,
                     {"mnist": _over(time("published"), mine)}, how)  # fmt: skip
        if p not in ("highest", "tf32x3"):
            float32 = time("published", "highest")
            yield _judge("published per-layer way's θ step, in float32 as it comes, over it: at least 20", True, 20.0,
                         {"mnist": _over(float32, mine)}, how)  # fmt: skip


def _product_targets(data: Data, name: str, timing: str) -> Iterator[Data]:
    """Q v beside the compiled plain functions."""
    squares = [s for s in sizes(data, "qv") if s.isdigit()]
    for p in _measured(data, name, "qv"):
        how = (name, p, timing)
        ratio = {s: _over(compiled(data, "qv", s, p, timing), ms(data, "qv", s, name, p, timing)) for s in squares}
        narrow = {s: r for s, r in ratio.items() if int(s) <= WIDEST_TARGET}
        yield _judge(f"compiled reference's Q v over it, every d ≤ {WIDEST_TARGET}: at least 2", True, 2.0, narrow, how)
        yield _judge("compiled reference's Q v over it, every d: at least 0.95", True, 0.95, ratio, how)


def _refresh_targets(data: Data, name: str, timing: str) -> Iterator[Data]:
    """P and S of large blocks beside torch.mm."""
    tall = [s for s in sizes(data, "refresh") if s.isdigit() and (int(s) >= TALLEST or data.get("rehearsal"))]
    time = lambda size, by, precision: ms(data, "refresh", size, by, precision, timing)
    for p in _measured(data, name, "refresh"):
        ratio = {s: _over(time(s, "mm", p), time(s, name, p)) for s in tall}
        yield _judge(f"torch.mm's RᵀR and LLᵀ over a refresh, d ≥ {TALLEST}: at least 1.5", True, 1.5, ratio,
                     (name, p, timing))  # fmt: skip


def _measured(data: Data, name: str, kind: str, size: str | None = None) -> list[str]:
    """The precisions at which a backend is measured."""
    return [p for p in precisions(data, kind, size) if name != "reference" or REFERENCE[p] == p]


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _judge(text: str, at_least: bool, limit: float, values: dict[str, float | None], how: tuple[str, ...]) -> Data:
    """One target's record. ``values``: by size; ``how``: backend, precision and timing."""
    known = {k: v for k, v in values.items() if v is not None}
    worst = (min if at_least else max)(known, key=lambda k: known[k]) if known else None
    value = None if worst is None else known[worst]
    complete = len(known) == len(values)
    met = None if value is None else (value >= limit if at_least else value <= limit)
    met = None if met and not complete else met  # what is missing might not
    return {
        "target": text, "limit": limit, "backend": how[0], "precision": how[1], "timing": how[2],
        "value": value, "at": worst, "measured": f"{len(known)} of {len(values)}", "met": met,
    }  # fmt: skip
