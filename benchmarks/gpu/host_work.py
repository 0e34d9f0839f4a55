"""What the host does for a step of a GPU backend, with launches stubbed: so it is measured without a GPU.

    python -m benchmarks.gpu.host_work [--blocks 100] [--repeats 200]

prints a Markdown table. Another backend's rows come from a module host_work_<backend>.py with ``measure(blocks,
repeats) -> list[Row]``.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

BACKENDS = ("triton", "cuda")
HEADER = ("backend", "op", "blocks", "µs, best", "µs, median", "µs after it, best", "launches", "uploads", "bytes")


class Row(NamedTuple):
    """One op of one backend."""

    backend: str
    op: str  # and what distinguishes it: "θ, rms"
    blocks: int
    best_us: float  # from the call until the last launch is queued
    median_us: float
    after_us: float  # from there until the op returns: best
    launches: int
    uploads: int  # copies from the host to the device
    bytes: int  # of those


class Times(NamedTuple):
    """µs of repeated calls: until the last launch is queued, and from there."""

    before: list[float]
    after: list[float]

    def row(self, backend: str, op: str, blocks: int, launches: int, uploads: int, size: int) -> Row:
        """A row of these times."""
        best, median = min(self.before), statistics.median(self.before)
        return Row(backend, op, blocks, best, median, min(self.after), launches, uploads, size)


def timed(
    call: Callable[[], object], last_launch: Callable[[], float], repeats: int, prepare: Callable[[], object]
) -> Times:
    """``last_launch``: ``time.perf_counter`` of the latest launch. ``prepare``: before each call, not measured."""
    found = Times([], [])
    for _ in range(repeats):
        prepare()
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        found.before.append(1e6 * (last_launch() - start))
        found.after.append(1e6 * (end - last_launch()))
    return found


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for row in rows:
        lines.append("| " + " | ".join(f"{x:.0f}" if isinstance(x, float) else str(x) for x in row) + " |")
    return "\n".join(lines)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _versions() -> str:
    try:
        import triton

        with_triton = f", Triton {triton.__version__}"
    except ImportError:
        with_triton = ""
    return f"Python {platform.python_version()}, torch {torch.__version__}{with_triton}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of every backend whose module is there."""
    parser = argparse.ArgumentParser(description="What the host does for a step of a GPU backend, launches stubbed.")
    parser.add_argument("--blocks", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=200)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[Row] = []
    for backend in BACKENDS:
        name = f"benchmarks.gpu.host_work_{backend}"
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            print(f"{backend}: not measured: {error}\n")
            continue
        rows += module.measure(given.blocks, given.repeats)
    print(f"`python -m benchmarks.gpu.host_work --blocks {given.blocks} --repeats {given.repeats}`, one thread;")
    print(f"{_processor()}, {os.cpu_count()} logical CPUs; {_versions()}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
