"""What the compilers say of the CUDA kernels: AddressSanitizer (on the CPU), ptxas's report, the extension's import."""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fishleg_fast import native
from fishleg_fast.backends import cuda, reference, registry
from support.cuda_emulation import KERNELS, ROOT, build, fingerprint, only_one

OPS = ("refresh", "qv", "inner", "theta_step", "lambda_step", "average_moments", "natural_step", "start_kfac")
DEVICE_KERNELS = [path for path in KERNELS if "__global__" in path.read_text(encoding="utf-8")]
ARCHITECTURES = (80, 90, 100)  # those that the extension is built for; the last from nvcc 12.8 on


@pytest.mark.parametrize("op", OPS)
def test_signatures_are_the_references(op: str) -> None:
    assert inspect.signature(getattr(cuda, op)) == inspect.signature(getattr(reference, op))


def test_memory_is_accessed_within_bounds() -> None:
    """Every kernel on the CPU under AddressSanitizer, with buffers of exact size; overflow and alignment too."""
    sanitizers = ["-fsanitize=address,alignment,signed-integer-overflow,shift", "-fno-sanitize-recover", "-g1", "-O1"]
    program = build([ROOT / "csrc/tests/cuda_memory.cpp"], "cuda_memory", sanitizers, [])
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


# Availability


def test_the_backend_says_why_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cuda" in registry.BACKENDS
    ok, reason = cuda.available()
    assert ok == (torch.cuda.is_available() and native.features()["cuda"] is True) or not ok
    assert reason
    monkeypatch.setattr(native, "features", lambda: {"cuda": True})
    for device, dtype, words in [("cpu", torch.float32, "not for cpu"), ("cuda", torch.float64, "float64")]:
        ok, reason = cuda.available(torch.device(device), dtype)
        assert not ok and words in reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ok, reason = cuda.available()
    assert not ok and "torch finds no CUDA device" in reason
    monkeypatch.setattr(native, "features", lambda: {"cuda": False})
    monkeypatch.setattr(native, "cuda_status", lambda: (False, "the extension is without CUDA: it was built so"))
    assert cuda.available() == (False, "the extension is without CUDA: it was built so")
    monkeypatch.setattr(native, "available", lambda: (False, "not built"))
    assert cuda.available() == (False, "not built")


def test_an_old_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "features", lambda: {"cuda": True})
    monkeypatch.setattr(native, "cuda_status", lambda: (True, "1 device"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, usable in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        ok, reason = cuda.available()
        assert ok == usable and (ok or "8.0" in reason)


def test_the_extension_has_the_plan_and_needs_no_gpu_to_be_imported() -> None:
    if not native.features()["cuda"]:
        pytest.skip(native.cuda_status()[1])
    extension = native.extension()
    plan = extension.CudaPlan(2, [("layer", 1, 0, 4, 3, 1, [((4, 3), (3, 1), (3, 1), 0, 0, 0, -1)], False)], 0)
    assert plan.workspace_bytes > 0
    with pytest.raises(ValueError, match="block 'layer': its parts have 8 entries, not 12"):
        extension.CudaPlan(2, [("layer", 1, 0, 4, 3, 1, [((4, 2), (2, 1), (2, 1), 0, 0, 0, -1)], False)], 0)
    if not native.cuda_status()[0]:
        on_the_host = [torch.zeros(4, 3), torch.zeros(4, 4), torch.zeros(3, 3), torch.zeros(4, 3)]
        assert plan.qv(0, 0, on_the_host[:1], None, [*on_the_host[1:3], None], on_the_host[3:]) is False


# ptxas's report


def nvcc() -> str:
    found = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        pytest.skip("nvcc is not installed")
    return found


@functools.cache
def architectures() -> tuple[int, ...]:
    known = subprocess.run([nvcc(), "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    return tuple(a for a in ARCHITECTURES if f"sm_{a}" in known)


@functools.cache
def compiled() -> list[dict]:
    """ptxas's report of every kernel for every architecture, and the kernel's PTX."""
    compiler = nvcc()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    folder = ROOT / "build/cuda_on_cpu"
    result = folder / f"ptxas-{fingerprint(compiler, version, str(architectures()))}.json"

    def compile_one(source: Path) -> list[dict]:
        kept = Path(tempfile.mkdtemp(prefix="ptx-", dir=folder))
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures()]
        done = subprocess.run(
            [compiler, "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", *targets, "--keep", "--keep-dir",
             str(kept), "-c", str(source), "-o", str(kept / "made.o")], capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        ptx = next(kept.glob(f"*compute_{architectures()[0]}*.ptx")).read_text()
        shutil.rmtree(kept)
        pattern = (
            r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads.*?Used (\d+) registers"
        )
        found = re.findall(pattern, done.stderr, re.DOTALL)
        assert len(found) == done.stderr.count("Compiling entry function")
        bodies = dict(re.findall(r"\.entry (\w+)\((.*?)\n}", ptx, re.DOTALL))
        keys = ("frame", "spill_stores", "spill_loads", "registers")
        return [
            {"kernel": name, "architecture": int(a), **dict(zip(keys, map(int, numbers), strict=True)),
             "tf32": bodies[name].count("mma.sync.aligned.m16n8k8"),
             "bf16": bodies[name].count("mma.sync.aligned.m16n8k16"),
             "fma": bodies[name].count("fma.rn.f32"), "copies": bodies[name].count("cp.async.cg.shared.global"),
             "groups": bodies[name].count("cp.async.commit_group"),
             "stores": len(re.findall(r"st\.shared\.(?:v[24]\.)?f32", bodies[name]))}
            for name, a, *numbers in found  # the PTX is of the first architecture, and much the same for the others
        ]  # fmt: skip

    with only_one(folder):
        if not result.exists():
            for old in folder.glob("ptxas-*.json"):
                old.unlink()
            with ThreadPoolExecutor(2) as pool:
                rows = [row for rows in pool.map(compile_one, DEVICE_KERNELS) for row in rows]
            result.write_text(json.dumps(rows))
        return json.loads(result.read_text())


def test_no_kernel_spills_or_uses_local_memory() -> None:
    rows = compiled()
    for source in DEVICE_KERNELS:
        for name in re.findall(r"__global__ void(?: __launch_bounds__\([\w, ]+\))? (\w+)\(", source.read_text("utf-8")):
            for architecture in architectures():
                assert any(name in r["kernel"] and r["architecture"] == architecture for r in rows), (
                    name,
                    architecture,
                )
    for row in rows:
        assert row["spill_stores"] == row["spill_loads"] == row["frame"] == 0, row


def test_products_are_made_by_tensor_cores() -> None:
    kinds = dict(enumerate(("ieee", "tf32x3", "tf32", "bf16")))  # as csrc/cuda/tables.h has them
    rows = [r for r in compiled() if "products_kernel" in r["kernel"] or "chain_kernel" in r["kernel"]]
    assert len(rows) == 3 * len(kinds) * len(architectures())  # products with and without plus_transpose, chains
    for row in rows:
        number = re.search(r"PrecisionE(\d)E", row["kernel"])
        assert number is not None
        kind = kinds[int(number[1])]
        assert (row["tf32"] > 0) == kind.startswith("tf32"), row
        assert (row["bf16"] > 0) == (kind == "bf16"), row
        assert kind != "ieee" or row["fma"] >= 32, row


def test_operands_reach_shared_memory_by_asynchronous_copies_alone() -> None:
    """16 bytes each, in every precision, one group of copies ahead; what is stored otherwise is a chain's P X."""
    rows = [r for r in compiled() if "products_kernel" in r["kernel"] or "chain_kernel" in r["kernel"]]
    for row in rows:
        if "chain_kernel" in row["kernel"]:  # P and X, then S: a first tile and the next; unevenly unrolled
            groups, least, stores = 4, 6, 16  # P X: 32 entries a thread, two at a time
        else:  # A and B in each layout: a first tile and the next, 4 copies a thread
            layouts = 2 if "Lb1E" in row["kernel"] else 3
            groups, least, stores = 2 * layouts, 2 * layouts * 2 * 4, 0
        assert row["groups"] == groups and row["copies"] >= least and row["stores"] == stores, row
