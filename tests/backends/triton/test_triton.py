"""The Triton backend without a GPU: its interface here; its kernels interpreted, by a process of their own each.

Triton decides at import whether kernels are interpreted, so the tests that interpret them are in triton_*.py,
which run with TRITON_INTERPRET=1 and leave this process as it is: the compile tests need the compiler.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fishleg_fast.backends import reference, registry

pytest.importorskip("triton")
from fishleg_fast.kernels import backend

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
OPS = ["refresh", "qv", "inner", "theta_step", "lambda_step", "average_moments", "natural_step", "start_kfac"]


@pytest.mark.parametrize("name", [*OPS, "available"])
def test_signatures_are_the_references(name: str) -> None:
    ours, theirs = inspect.signature(getattr(backend, name)), inspect.signature(getattr(reference, name))
    if name == "available":
        assert list(ours.parameters) == list(theirs.parameters)
    else:
        assert ours == theirs


def test_availability_gives_reasons() -> None:
    if not torch.cuda.is_available():
        ok, reason = registry.available("triton")
        assert not ok and "CUDA" in reason
    ok, reason = registry.available("triton", torch.device("cpu"), torch.float64)
    assert not ok and "float64" in reason and "reference" in reason
    ok, reason = registry.available("triton", torch.device("meta"), torch.float32)
    assert not ok and "meta" in reason
    with pytest.raises(RuntimeError, match="backend='triton' is unavailable"):
        registry.choose("triton", torch.device("cpu"), torch.float32)
    assert registry.defaults(torch.device("cpu"), torch.float32)[0] == {}, "on a CPU by name alone"


def test_available_needs_no_triton() -> None:
    code = (
        "import sys, torch; from fishleg_fast.backends import registry; registry.report();"
        "print(registry.choose(None, torch.device('cpu'), torch.float32)[0], 'triton' in sys.modules)"
    )
    before = "import sys, torch; print('triton' in sys.modules)"
    loaded = [
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True).stdout.split()
        for c in (before, code)
    ]
    assert loaded[1][1:] == loaded[0] and loaded[1][0] != "triton"


def test_pinning_says_what_it_needs() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, and it would take minutes")
    command = [sys.executable, "-m", "benchmarks.gpu.pin_configurations"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "CUDA device" in done.stderr


INTERPRETED = ["products", "theta", "polar", "lambda", "training"]  # triton_*.py


@pytest.mark.slow
@pytest.mark.parametrize("which", INTERPRETED)
def test_interpreted(which: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(HERE / f"triton_{which}.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
