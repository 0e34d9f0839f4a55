"""How much memory an optimizer keeps between steps, beside the parameters: of every optimizer on every problem.

    python -m benchmarks.study.state_memory

Counted is what tensors there are after twelve steps that were not there before the optimizer was made, but the
gradients, each piece of memory once: state, products kept of it, and buffers that are written anew in each step.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.paths import RESULTS
from benchmarks.study.problems import PROBLEMS
from benchmarks.study.records import versions
from benchmarks.study.tuning import rounded

RECORDS = RESULTS / "state_memory.json"
NAMES = ("adamw", "muon", "soap", "fishleg")
STEPS = 12  # the first update of λ and the second anchoring among them


def held() -> dict[int, int]:
    """Bytes of the memory of all tensors, by where it is."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def state_bytes(problem: str, optimizer: str, steps: int = STEPS) -> dict[str, Any]:
    """The record of one optimizer."""
    from benchmarks.common.optimizers import OPTIMIZERS
    from benchmarks.train.training import batches, training_step

    torch.manual_seed(0)
    setting = PROBLEMS[problem]
    made = setting.make()
    model = made.make_model().train()
    stream = batches(len(made.data.train), setting.batch, 0)
    before = held()
    optimizers = OPTIMIZERS[optimizer].make(model, made.likelihood, 1e-3)
    for _ in range(steps):
        training_step(made, model, optimizers, next(stream))
    for o in optimizers:
        o.zero_grad()
    kept = {place: size for place, size in held().items() if place not in before}
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "problem": problem, "optimizer": optimizer, "bytes": sum(kept.values()), "parameter bytes": parameters,
        "per parameter byte": rounded(sum(kept.values()) / parameters), "steps": steps,
        "versions": versions(optimizer), "date": str(date.today()),
        "command": "python -m benchmarks.study.state_memory",
    }  # fmt: skip


def main(path: Path = RECORDS) -> int:
    """Measure all, each in a process of its own."""
    found = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for problem in PROBLEMS:
            for name in NAMES:
                found.append(pool.apply(state_bytes, (problem, name)))
                print(f"{problem} {name}: {found[-1]['per parameter byte']:.3g} of the parameters' bytes", flush=True)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
