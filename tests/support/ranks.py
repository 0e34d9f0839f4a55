"""Functions run by several processes at once, each a rank of a gloo group, with an end to their patience.

A process that hangs prints where, all threads' stacks, and ends; so do then the others, by the group's time-out.
"""

from __future__ import annotations

import faulthandler
import fcntl
import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

PATIENCE = 150.0  # seconds for all of it; processes share two cores with other tests
GROUP = 40.0  # that a rank waits for others
TESTS = Path(__file__).resolve().parents[1]


class RanksFailed(AssertionError):
    """Some process did not end well: what each of them printed."""


def run_ranks(count: int, where: str, patience: float = PATIENCE, **given: Any) -> list[Any]:
    """What ``where``, "module:function", returns on each rank for ``given``; RanksFailed where one did not end well."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(given, f"{folder}/given")
        command = [sys.executable, "-m", "support.ranks", where, folder, str(count), str(patience)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "OMP_NUM_THREADS": "1"}
        outputs = [open(f"{folder}/output{rank}", "w+") for rank in range(count)]
        processes = [
            subprocess.Popen([*command, str(rank)], env=env, stdout=out, stderr=subprocess.STDOUT)
            for rank, out in enumerate(outputs)
        ]
        try:
            codes = [p.wait(patience + 20) for p in processes]
        finally:
            for p in processes:
                p.kill()
                p.wait()
        texts = []
        for out in outputs:
            out.seek(0)
            texts.append(out.read())
            out.close()
        if any(codes):
            told = "\n".join(
                f"rank {k} ended with {code}:\n{text}" for k, (code, text) in enumerate(zip(codes, texts, strict=True))
            )
            raise RanksFailed(told)
        return [torch.load(f"{folder}/found{rank}", weights_only=False) for rank in range(count)]


def once(factory: pytest.TempPathFactory, name: str, compute: Callable[[], Any]) -> Any:
    """``compute()``, by one of xdist's processes for all of them."""
    folder = factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = folder / f"{name}.pt"
        if not kept.exists():
            torch.save(compute(), kept)
        return torch.load(kept, weights_only=False)


def main(where: str, folder: str, count: str, patience: str, rank: str) -> None:
    """One rank."""
    faulthandler.dump_traceback_later(float(patience), exit=True)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=int(count),
        timeout=timedelta(seconds=GROUP),
    )  # fmt: skip
    module, _, function = where.partition(":")
    found = getattr(importlib.import_module(module), function)(**torch.load(f"{folder}/given", weights_only=False))
    torch.save(found, f"{folder}/found{rank}")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may still be there when the interpreter comes down, which then aborts now and then


if __name__ == "__main__":
    main(*sys.argv[1:])
