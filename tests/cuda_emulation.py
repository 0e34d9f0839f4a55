"""The CUDA kernels compiled for the CPU (csrc/tests/cuda_on_cpu.h), as a Python module that fishleg_fast.cuda can use.

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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = [p for p in sorted((ROOT / "csrc/cuda").glob("*.cu")) if p.name != "device_status.cu"]
SOURCES = [*KERNELS, ROOT / "csrc/cuda/bindings.cpp", ROOT / "csrc/tests/cuda_module.cpp"]
FLAGS = [
    "-x", "c++", "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror",
    "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", "-DFISHLEG_CUDA_ON_CPU", f"-I{ROOT / 'csrc'}",
]  # fmt: skip


def compiler() -> str | None:
    """A C++ compiler that takes g++'s flags."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def fingerprint(*more: str) -> str:
    """Of all that the build depends on."""
    digest = hashlib.sha256(" ".join([*more, *FLAGS, sys.version]).encode())
    for path in sorted((ROOT / "csrc").rglob("*.*")):
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


def build(folder: Path, *flags: str) -> Path:
    """The module in ``folder``, built where it is not there yet."""
    import pybind11

    cxx = compiler()
    assert cxx is not None
    target = folder / f"_cuda_on_cpu-{fingerprint(cxx, *flags)}" / "_cuda_on_cpu.so"
    with only_one(folder):
        if target.exists():
            return target
        target.parent.mkdir(exist_ok=True)
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]

        def compile_one(source: Path) -> Path:
            made = target.parent / f"{source.name}.o"
            command = [cxx, *FLAGS, *flags, *includes, "-c", str(source), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return made

        with ThreadPoolExecutor(2) as pool:
            objects = [str(path) for path in pool.map(compile_one, SOURCES)]
        made = target.with_suffix(".tmp")
        done = subprocess.run([cxx, "-shared", *flags, *objects, "-o", str(made)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        made.rename(target)
    return target


@functools.cache
def emulated() -> ModuleType:
    """The module; skips the test where it cannot be built."""
    if sys.platform != "linux" or compiler() is None:
        pytest.skip("the kernels are compiled for the CPU by g++ or clang++ on Linux")
    spec = importlib.util.spec_from_file_location("_cuda_on_cpu", build(ROOT / "build/cuda_on_cpu"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
