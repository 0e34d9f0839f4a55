"""Every op of a backend on a CPU by pytest-benchmark, with GFLOP/s and GB/s beside what the machine reaches.

    python -m pytest benchmarks/cpu/micro_ops.py --benchmark-only
    python -m benchmarks.cpu.micro_ops        # the same, and a table: results/micro_ops.md

One layer with biases, (outputs, inputs + 1). FLOPs are those of the formulas with dense operands, bytes what has to be
read and written once. Beside them what torch reaches with the same threads: the best of products of two square matrices
of 512, 1024 and 2048, and a copy of 256 MB.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.common.machine import cpu_name
from benchmarks.common.paths import RESULTS, ROOT
from benchmarks.common.tables import table
from fishleg_fast import CategoricalLikelihood, FishLeg, __version__
from fishleg_fast.algebra.structures.base import LayerStatistics
from fishleg_fast.backends.arithmetic import own_arithmetic
from fishleg_fast.backends.protocol import LambdaOptions, ThetaOptions

SIZES = ((128, 128), (512, 512), (512, 1536))  # whose factors are dense
POSITIONS = 1024  # rows that moments are made of
BACKENDS = ("cpp", "reference")
Counts = tuple[float, float]  # FLOPs, bytes


def best(call: Callable[[], Any], repeats: int = 5) -> float:
    """Seconds of the fastest call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


@cache
def machine() -> tuple[float, float]:
    """GFLOP/s and GB/s that torch reaches."""
    gflops = 0.0
    for size in (512, 1024, 2048):
        a = torch.randn(size, size)
        into = torch.empty_like(a)
        gflops = max(gflops, 2 * size**3 / best(lambda a=a, into=into: torch.mm(a, a, out=into), 20) / 1e9)
    big = torch.empty(2**26)
    copy = torch.zeros_like(big)
    return gflops, 2 * big.nbytes / best(lambda: copy.copy_(big)) / 1e9


class Case:
    """An optimizer of one layer, with what its ops take."""

    def __init__(self, backend: str, outputs: int, inputs: int) -> None:
        torch.manual_seed(0)
        self.net = nn.Linear(inputs, outputs)
        likelihood = CategoricalLikelihood()
        settings = dict(backend=backend, thin_gradients=False, lr=1e-6, update_aux_every=10)
        self.optimizer = FishLeg(self.net, likelihood=likelihood, **settings)
        x, y = torch.randn(64, inputs), torch.randint(outputs, (64,))
        for step in range(3):
            self.optimizer.zero_grad()
            likelihood.nll(y, self.net(x)).backward()
            if step < 2:
                self.optimizer.step()
        self.blocks, self.gs = self.optimizer._gather()
        self.ops, self.m, self.n = self.optimizer._ops, *self.blocks[0].shape
        self.us = [torch.randn(self.m, self.n)]
        self.vs, self.fvs = self.ops.qv(self.blocks, self.us), [torch.randn(self.m, self.n)]
        rows = torch.randn(POSITIONS, self.n), torch.randn(POSITIONS, self.m)
        self.statistics = [LayerStatistics(*rows, float(POSITIONS))]

    def call(self, op: str) -> tuple[Callable[[], Any], Counts]:
        """The op, and what it does by count."""
        m, n, ops, blocks = self.m, self.n, self.ops, self.blocks
        entries, factors = 4.0 * m * n, 4.0 * (m * m + n * n)  # bytes
        product = 2.0 * m * n * (m + n)
        theta = {k: ThetaOptions(nesterov=True, normalize=k) for k in ("rms", "spectral")}
        blocks[0].spectral = op == "theta_step, spectral"
        small, cubes = min(m, n), float(m**3 + n**3)
        # Six steps of the iteration: XXᵀ and its square, symmetric, and a product with X at the end of those.
        polar = 6 * (small**3 + small**2 * max(m, n)) + 2.0 * small**2 * max(m, n)
        learning = LambdaOptions(damping=0.1, lr=1e-9)
        calls: dict[str, tuple[Callable[[], Any], Counts]] = {
            "qv": (lambda: [getattr(v, "dense", v) for v in ops.qv(blocks, self.us)], (product, 2 * entries + factors)),
            "inner": (lambda: ops.inner(self.us, self.fvs), (2.0 * m * n, 2 * entries)),
            "theta_step": (lambda: ops.theta_step(blocks, self.gs, theta["rms"]), (product, 5 * entries + factors)),
            "theta_step, spectral": (
                lambda: ops.theta_step(blocks, self.gs, theta["spectral"]), (product + polar, 5 * entries + factors),
            ),
            "lambda_step": (
                lambda: ops.lambda_step(blocks, self.us, self.vs, self.fvs, learning),
                (2 * product + 2 * cubes, 3 * entries + 6 * factors),
            ),
            "average_moments": (
                lambda: ops.average_moments(blocks, self.statistics, 0.9),
                (float(POSITIONS * (m * m + n * n)), 4.0 * POSITIONS * (m + n) + 2 * factors),
            ),
            "start_kfac, refresh": (lambda: self._start(), (2 / 3 * cubes + cubes, 4 * factors)),
        }  # fmt: skip
        return calls[op]

    def _start(self) -> None:
        self.ops.start_kfac(self.blocks, 1.0)
        self.ops.refresh(self.blocks)


OPS = ("qv", "inner", "theta_step", "theta_step, spectral", "lambda_step", "average_moments", "start_kfac, refresh")


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_op(benchmark: Any, op: str, backend: str, size: tuple[int, int]) -> None:
    case = Case(backend, *size)
    call, (flops, bytes_) = case.call(op)
    with torch.no_grad(), own_arithmetic(case.blocks, case.optimizer._precision):
        benchmark.pedantic(call, rounds=15, warmup_rounds=3)
    gflops, gbs = machine()
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(
        op=op, backend=backend, size=f"{size[0]} × {size[1] + 1}", microseconds=seconds * 1e6,
        gflops=flops / seconds / 1e9, gbs=bytes_ / seconds / 1e9,
        torch_gflops=gflops, torch_gbs=gbs, of_torch=max(flops / gflops, bytes_ / gbs) / 1e9 / seconds,
    )  # fmt: skip


def main() -> int:
    """Run all, and write the table."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.json"
        command = ["-m", "pytest", "-q", "-p", "no:xdist", __file__, "--benchmark-only", f"--benchmark-json={told}"]
        subprocess.run([sys.executable, *command, "--benchmark-quiet"], cwd=ROOT, check=True)
        found = [x["extra_info"] for x in json.loads(told.read_text())["benchmarks"]]
    gflops, gbs = found[0]["torch_gflops"], found[0]["torch_gbs"]
    rows = [
        [
            f"`{x['op']}`", x["size"], x["backend"], f"{x['microseconds']:.0f}", f"{x['gflops']:.3g}",
            f"{x['gbs']:.3g}", f"{100 * x['of_torch']:.0f} %",
        ]
        for x in found
    ]  # fmt: skip
    text = "\n".join([
        "# Ops on a CPU", "", (__doc__ or "").split("\n\n")[2].replace("\n", " "), "",
        f"`python -m benchmarks.cpu.micro_ops`, {cpu_name()}, {torch.get_num_threads()} threads, fishleg_fast "
        f"{__version__}, torch {torch.__version__}, {date.today()}. torch: {gflops:.0f} GFLOP/s, {gbs:.1f} GB/s. "
        "*of torch's*: the seconds that those allow, over the ones taken (median of 15): over 100 % where the "
        "backend's own products are faster, operands are in a cache, or half of a symmetric product is left out.", "",
        table(["op", "layer", "backend", "µs", "GFLOP/s", "GB/s", "of torch's"], rows), "",
    ])  # fmt: skip
    (RESULTS / "micro_ops.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
