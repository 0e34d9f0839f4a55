"""What is in the results: keys are kind/size or model/contestant/precision."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.shapes import LISTS, TINY_LISTS, cost

Data = dict[str, Any]
TIMINGS = {"call": "eager calls", "device": "device alone"}
OPPONENTS = ("adamw", "published", "compiled", "compiled-graphs", "mm")
# precision of ours -> that of an opponent, where torch has not the same
PEERS = {"tf32x3": ("tf32x3", "highest"), "medium": ("medium", "high")}


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


def floor(data: Data, op: str, size: str, precision: str) -> float | None:
    """ms that the bytes or the FLOPs take at the least, at the speeds measured; None where these are missing."""
    lists = TINY_LISTS if data.get("rehearsal") else LISTS
    flops, bytes_ = cost(op, [(int(size), int(size))] if size.isdigit() else lists[size])
    bandwidth = data["results"].get("peak/copy", {}).get("bytes/s")
    peak = data["results"].get(f"peak/gemm/{precision}", {}).get("flop/s")
    return 1000 * max(bytes_ / bandwidth, flops / peak) if bandwidth and peak else None
