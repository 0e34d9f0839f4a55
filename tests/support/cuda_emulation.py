"""The CUDA kernels compiled for the CPU (csrc/tests/cuda_on_cpu.h), as a Python module that the CUDA backend can use.

What runs so is the plan, every kernel's index arithmetic and sums, and its barriers: not races, and not hardware.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = [p for p in sorted((ROOT / "csrc/cuda").rglob("*.cu")) if p.name != "device_status.cu"]
MODULE = [ROOT / f"csrc/{name}.cpp" for name in ("bindings/cuda", "bindings/places", "tests/cuda_module")]
FLAGS = [
    "-x", "c++", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror",
    "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", "-DFISHLEG_CUDA_ON_CPU", f"-I{ROOT / 'csrc'}",
]  # fmt: skip


def compiler() -> str | None:
    """A C++ compiler that takes g++'s flags."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def fingerprint(*more: str) -> str:
    """Of all that the build depends on."""
    digest = hashlib.sha256(" ".join([*more, *FLAGS, sys.version]).encode())
    folders = ("csrc/*.h", "csrc/bindings/*", "csrc/cuda/**/*.*", "csrc/tests/cuda_*")
    for path in sorted(path for folder in folders for path in ROOT.glob(folder)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """One process at a time, so that pytest's workers do not all build."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(sources: Sequence[Path], name: str, flags: Sequence[str], link: Sequence[str]) -> Path:
    """The kernels and ``sources`` as a program or module, built where it is not there yet."""
    cxx = compiler()
    if sys.platform != "linux" or cxx is None:
        pytest.skip("the kernels are compiled for the CPU by g++ or clang++ on Linux")
    folder = ROOT / "build/cuda_on_cpu"
    target = folder / f"{name}-{fingerprint(cxx, *flags, *link)}" / name
    with only_one(folder):
        if target.exists():
            return target
        for old in folder.glob(f"{name}-*"):
            shutil.rmtree(old)
        target.parent.mkdir()

        def run(*command: str) -> None:
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"

        def compile_one(source: Path) -> str:
            made = str(target.parent / f"{name}-{source.name}.o")
            timed = source.suffix == ".cu" or "-DFISHLEG_CUDA_STUBBED" in flags
            quick = [] if timed else ["-O0"]  # what runs long are the kernels
            run(cxx, *FLAGS, *flags, *quick, "-c", str(source), "-o", made)
            return made

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, [*KERNELS, *sources]))
        made = str(target.with_suffix(".tmp"))
        run(cxx, *flags, *link, *objects, "-o", made)
        os.replace(made, target)
    return target


@functools.cache
def emulated() -> ModuleType:
    """The kernels as a Python module; skips the test where it cannot be built."""
    return _module("_cuda_on_cpu", ["-O2"])


@functools.cache
def stubbed() -> ModuleType:
    """The same with launches that are only counted, so that the host's work can be timed."""
    return _module("_cuda_stubbed", ["-O1", "-DFISHLEG_CUDA_STUBBED"])


def _module(name: str, flags: Sequence[str]) -> ModuleType:
    import pybind11

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    built = build(MODULE, f"{name}.so", [*includes, *flags], ["-shared"])
    spec = importlib.util.spec_from_file_location(name, built)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
