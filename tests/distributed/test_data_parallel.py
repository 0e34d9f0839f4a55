"""DistributedDataParallel and gradients averaged by hand: the same as one process on the joined batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support import distributed_cases
from support.dense import relative
from support.ranks import once, run_ranks

CASES: dict[str, dict[str, Any]] = {
    "mlp": {"model": "mlp"},
    "by hand": {"model": "mlp", "wrapped": False},
    "attention": {"model": "attention"},
    "convolutions": {"model": "convolutions"},
    "rms": {"model": "mlp", "normalize": "rms", "weight_decay": 0.1},
    "spectral": {"model": "mlp", "normalize": "spectral"},
    "trust": {"model": "mlp", "normalize": "trust"},
    "as computed": {"model": "mlp", "normalize": None, "lr": 1e-3},
    "diagkron": {"model": "mlp", "structure": "diagkron"},
    "steps too long": {"model": "mlp", "lr": 3.0, "steps": 14},
    "steps too long, weight decay": {"model": "mlp", "lr": 3.0, "weight_decay": 0.1, "steps": 14},
    "hessian": {"model": "mlp", "fisher": "hessian"},
    "momentum": {"model": "mlp", "u_sampling": "momentum", "momentum": "before"},
    "gaussian": {"model": "mlp", "u_sampling": "gaussian"},
    "unused": {"model": "unused", "ddp": {"find_unused_parameters": True}},
    "static graph": {"model": "mlp", "ddp": {"static_graph": True}},
    "pure": {"model": "mlp", "init": "sgd", "anchor_every": 0},
    "pure, convolutions": {"model": "convolutions", "init": "sgd", "anchor_every": 0},
    "pure, by Adam": {"model": "mlp", "init": "sgd", "anchor_every": 0, "aux_update": "adam"},
    "bfloat16": {"model": "mlp", "dtype": torch.bfloat16, "steps": 4},
    "float32": {"model": "mlp", "dtype": torch.float32},
}
LOOSE = {torch.bfloat16: 0.1, torch.float32: 2e-3}  # of a few steps, which carry rounding on
# Not where the batch's first number decides which layer is used, nor where moments are of a batch's gradient, which are
# those of the joined batch in expectation alone.
ALONE = [name for name in CASES if name not in ("unused", "attention")]


FEW = ("mlp", "by hand", "unused")  # with four ranks, which take turns on few cores
RUNS = [(2, name) for name in CASES] + [(4, name) for name in FEW]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, dict]]]:
    """By the number of ranks, of each rank, its cases."""
    cases, where = {2: CASES, 4: {name: CASES[name] for name in FEW}}, "support.distributed_cases:many"
    return once(tmp_path_factory, __name__, lambda: {n: run_ranks(n, where, cases=mine) for n, mine in cases.items()})


@pytest.mark.parametrize(("count", "name"), RUNS)
def test_ranks_stay_equal_bit_for_bit(count: int, name: str, found: dict[int, list[dict[str, dict]]]) -> None:
    first, *others = found[count]
    assert len(others) == count - 1
    for other in others:
        assert other[name]["told"] == first[name]["told"]
        assert all(torch.equal(a, b) for a, b in zip(first[name]["tensors"], other[name]["tensors"], strict=True))


@pytest.mark.parametrize(("count", "name"), [(count, name) for count, name in RUNS if name in ALONE])
def test_ranks_train_as_one_process_on_the_joined_batch(
    count: int, name: str, found: dict[int, list[dict[str, dict]]]
) -> None:
    given = {key: value for key, value in CASES[name].items() if key != "ddp"}
    want = distributed_cases.train(**given)
    mine = found[count][0][name]
    assert mine["told"] == want["told"]
    assert mine["told"]["shortened_steps"] > 2 or not name.startswith("steps too long")
    limit = LOOSE.get(given.get("dtype", torch.float64), 1e-9)
    errors = [relative(a, b) for a, b in zip(mine["tensors"], want["tensors"], strict=True)]
    assert max(errors) <= limit, errors
