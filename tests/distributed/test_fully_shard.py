"""fully_shard (FSDP2), also with copies (HSDP): the same as one process on the joined batch, and λ on one rank each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support import sharded_cases
from support.dense import relative
from support.ranks import RanksFailed, once, run_ranks

CASES: dict[str, dict[str, Any]] = {
    "mlp": {"model": "mlp"},
    "convolutions": {"model": "convolutions"},
    "gpt": {"model": "gpt", "steps": 30, "lr": 1e-3},
    "resnet": {"model": "resnet", "steps": 30, "lr": 1e-3},
    "attention": {"model": "attention"},
    "learned noise": {"model": "mlp", "noise": True},
    "learned noise, pure": {"model": "mlp", "noise": True, "init": "sgd", "anchor_every": 0, "aux_update": "adam"},
    "checkpointed": {"model": "checkpointed"},
    "scaled": {"model": "scaled"},
    "steps too long": {"model": "mlp", "lr": 3.0, "steps": 14},
    "steps too long, learned noise": {"model": "mlp", "noise": True, "init": "sgd", "anchor_every": 0,
                                      "aux_update": "adam", "lr": 3.0, "steps": 14},
    "steps too long, opaque": {"model": "opaque", "lr": 3.0, "steps": 14},
    "steps too long, weight decay": {"model": "mlp", "lr": 1.0, "weight_decay": 0.1, "steps": 10},
    "steps too long, gpt, decay": {"model": "gpt", "lr": 1.0, "weight_decay": 0.1, "steps": 10},
    "steps too long, opaque, decay": {"model": "opaque", "lr": 3.0, "weight_decay": 0.1, "steps": 14},
    "steps too long, noise, decay": {"model": "mlp", "noise": True, "init": "sgd", "anchor_every": 0,
                                     "aux_update": "adam", "lr": 3.0, "weight_decay": 0.1, "steps": 14},
    "opaque": {"model": "opaque"},
    "recurrent": {"model": "recurrent", "init": "sgd", "anchor_every": 0, "aux_update": "adam"},
    "rms": {"model": "mlp", "normalize": "rms", "weight_decay": 0.1},
    "spectral": {"model": "mlp", "normalize": "spectral", "weight_decay": 0.1},
    "as computed": {"model": "mlp", "normalize": None, "lr": 1e-3},
    "trust": {"model": "mlp", "normalize": "trust", "kappa": 1e-6, "weight_decay": 0.1},
    "trust after": {"model": "mlp", "normalize": "trust", "momentum": "after", "nesterov": False, "kappa": 1e-6},
    "momentum after": {"model": "mlp", "momentum": "after", "nesterov": False},
    "diagkron": {"model": "mlp", "structure": "diagkron"},
    "sumkron": {"model": "mlp", "structure": "sumkron"},
    "small factors": {"model": "mlp", "max_factor_size": 3},
    "best multiple": {"model": "mlp", "learn_scale": False},
    "preconditioned": {"model": "mlp", "precondition_aux": True},
    "ascent": {"model": "mlp", "maximize": True, "lr": 1e-3},
    "pure": {"model": "mlp", "init": "sgd", "anchor_every": 0},
    "pure, by Adam": {"model": "mlp", "init": "sgd", "anchor_every": 0, "aux_update": "adam"},
    "learned and anchored": {"model": "mlp", "update_aux_every": 3},
    "bfloat16": {"model": "mlp", "dtype": torch.bfloat16, "steps": 4},
    "float32": {"model": "mlp", "dtype": torch.float32},
}
CASES |= {  # what needs care beside layers of their own
    "frozen": {"model": "frozen", "units": "root"},
    "padded": {"model": "padded", "units": "root", "init": "sgd", "anchor_every": 0, "aux_update": "adam"},
    "hook": {"model": "hook"},
    "hook of a root": {"model": "hook", "units": "root"},
    "steps too long, padded, decay": {"model": "padded", "units": "root", "init": "sgd", "anchor_every": 0,
                                      "aux_update": "adam", "lr": 1.0, "weight_decay": 0.1, "steps": 10},
    "old weight norm": {"model": "old weight norm", "init": "sgd", "anchor_every": 0, "aux_update": "adam"},
    "one layer alone": {"model": "mlp", "units": "one"},
    "own parameter": {"model": "own parameter", "units": "one", "init": "sgd", "anchor_every": 0, "aux_update": "adam"},
    "sparse, ddp": {"model": "sparse", "copies": 0, "shard_state": True, "init": "sgd", "anchor_every": 0,
                    "aux_update": "adam"},
}
OWNED = (
    *("mlp", "opaque", "recurrent", "gpt", "attention", "learned noise, pure", "spectral", "trust"),
    *("bfloat16", "scaled", "padded", "steps too long"),
    *("steps too long, weight decay", "steps too long, padded, decay"),
)
CASES |= {f"{name}, ddp": {**CASES[name], "copies": 0, "shard_state": True} for name in OWNED}
UNUSED = {"model": "unused", "copies": 0, "shard_state": True, "ddp": {"find_unused_parameters": True}}
CASES["unused, ddp"] = UNUSED
LOOSE = {torch.bfloat16: 0.05, torch.float32: 1e-5}
# Moments of what no layer shows are of gradients of each rank's batch: as of the joined batch in expectation alone.
UNEQUAL = ("attention", "learned noise", "scaled", "attention, ddp", "scaled, ddp", "unused, ddp")
FEW = ("mlp", "gpt", "attention", "spectral", "gpt, ddp")
COPIES = {f"{name}, copies": {**CASES[name], "copies": 2} for name in ("mlp", "gpt")}
PATIENCE = 400.0  # seconds for all cases of so many ranks, on a machine that has other tests to run
RUNS = [(2, name) for name in CASES] + [(4, name) for name in (*FEW, *COPIES)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, dict]]]:
    """By the number of ranks, of each rank, its cases."""
    where, four = "support.sharded_cases:many", {name: {**CASES, **COPIES}[name] for name in (*FEW, *COPIES)}
    cases = {2: CASES, 4: four}
    return once(
        tmp_path_factory, __name__, lambda: {n: run_ranks(n, where, PATIENCE, cases=mine) for n, mine in cases.items()}
    )


@pytest.mark.parametrize(("count", "name"), RUNS)
def test_ranks_stay_equal_bit_for_bit(count: int, name: str, found: dict[int, list[dict[str, dict]]]) -> None:
    first, *others = found[count]
    for other in others:
        assert other[name]["told"] == first[name]["told"] and other[name]["norms"] == first[name]["norms"]
        assert all(torch.equal(a, b) for a, b in zip(first[name]["tensors"], other[name]["tensors"], strict=True))


@pytest.mark.parametrize(("count", "name"), RUNS)
def test_ranks_train_as_one_process_on_the_joined_batch(
    count: int, name: str, found: dict[int, list[dict[str, dict]]]
) -> None:
    given = {key: value for key, value in {**CASES, **COPIES}[name].items() if key not in ("ddp", "units")}
    want, mine = sharded_cases.train(**given), found[count][0][name]
    assert mine["told"] == want["told"] and mine["told"]["skipped_aux_steps"] == 0
    assert mine["told"]["shortened_steps"] > 2 or not name.startswith("steps too long")
    assert mine["told"]["anchors"] > 0 or given.get("anchor_every") == 0
    assert mine["wrong"] == want["wrong"] == (["2"] if "scaled" in name else [])
    if name not in UNEQUAL:
        errors = [relative(a, b) for a, b in zip(mine["tensors"], want["tensors"], strict=True)]
        by_differences = "opaque" in name or name.startswith("old weight norm")  # of double backward in one process
        differences = 1e-6 if "too long" in name else 1e-7
        exact = differences if by_differences else LOOSE.get(given.get("dtype", torch.float64), 1e-11)
        assert max(errors) <= exact, errors


@pytest.mark.parametrize(("count", "name"), RUNS)
def test_every_block_is_on_one_rank(count: int, name: str, found: dict[int, list[dict[str, dict]]]) -> None:
    copies = max({**CASES, **COPIES}[name].get("copies", 1), 1)
    held = sorted(block for rank in found[count][: count // copies] for block in rank[name]["blocks"])
    assert held == sorted(found[count][0][name]["told"]["normalize"])
    assert len(set(held)) == len(held)


def test_state_is_shared_out(found: dict[int, list[dict[str, dict]]]) -> None:
    """To each rank no more than its part of it, and half of the largest block more."""
    alone = sharded_cases.train(**CASES["gpt"])["bytes"]
    for count in (2, 4):
        for name in ("gpt", "gpt, ddp"):
            bytes_ = [rank[name]["bytes"] for rank in found[count]]
            assert max(bytes_) <= 1.35 * alone / count, (alone, bytes_)


REFUSED = {
    "training": "anchor_from should be 'drawn'",
    "capturable": "capturable should be False",
    "hessian": "fisher should be 'ggn'.*or update_aux_every=0",
    "other meshes": r"parameter '.\.weight' should be sharded along one dimension.*on the mesh of the others",
    "another rate": "parameter groups is .*'0.01'.* on rank 0 and .*'0.02'.* on rank 1",
    "replaced": "should stay in the optimizer",
    "hidden": "WrongDerivative: vᵀFv should be one number",
}


def test_what_does_not_go_with_it_is_refused_by_name() -> None:
    for said in run_ranks(2, "support.sharded_cases:refusals", names=list(REFUSED)):
        for name, pattern in REFUSED.items():
            with pytest.raises(AssertionError, match=pattern):
                raise AssertionError(said[name])


WENT_ON = {
    "nan in a pass": dict(steps=8, aux_steps=4, anchors=2, skipped_steps=0, skipped_aux_steps=1),
    "empty": dict(steps=8, aux_steps=4, anchors=2, skipped_steps=0, skipped_aux_steps=0),
    "nan": dict(steps=7, aux_steps=4, anchors=2, skipped_steps=1, skipped_aux_steps=0),
}


def test_what_one_rank_sees_is_skipped_or_postponed_by_all() -> None:
    first, second = run_ranks(2, "support.sharded_cases:faults", kinds=list(WENT_ON))
    for kind, counts in WENT_ON.items():
        a, b = first[kind], second[kind]
        assert a["told"] == b["told"] and a["told"] == a["told"] | counts, (kind, a["told"])
        assert all(torch.equal(x, y) and x.isfinite().all() for x, y in zip(a["tensors"], b["tensors"], strict=True))


def test_a_rank_that_dies_ends_the_others() -> None:
    with pytest.raises(RanksFailed, match="rank 1 ended with -9") as told:
        run_ranks(2, "support.sharded_cases:killed", patience=60.0)
    assert "rank 0 ended with 1" in str(told.value) and "Error" in str(told.value)


@pytest.mark.parametrize("model", ["mlp", "gpt"])
def test_a_training_goes_on_with_more_ranks_with_fewer_and_alone(model: str, tmp_path: Path) -> None:
    folder = sharded_cases.folder_of(tmp_path / "checkpoint")
    whole = run_ranks(2, "support.sharded_cases:saved", folder=folder, steps=10, at=4, model=model)
    four = run_ranks(4, "support.sharded_cases:resumed", folder=folder, steps=10, model=model)
    one = sharded_cases.resumed(folder, 10, model)
    for other in (four[0], one):
        assert other["first"] == 5
        errors = [relative(a, b) for a, b in zip(other["tensors"], whole[0]["tensors"], strict=True)]
        assert max(errors) <= 1e-9, errors
    seeds = [tuple(rank["seeds"]) for rank in (*whole, *four[2:], one)]
    assert seeds[0] == seeds[4] and len(set(seeds)) == 4


@pytest.mark.parametrize("model", ["gpt", "attention"])
def test_a_training_of_one_process_goes_on_with_ranks_and_is_saved_again(model: str, tmp_path: Path) -> None:
    first, second = (sharded_cases.folder_of(tmp_path / name) for name in ("first", "second"))
    alone = sharded_cases.saved(first, steps=14, at=3, model=model)
    two = run_ranks(2, "support.sharded_cases:resumed", folder=first, steps=14, model=model, again=second)
    again = run_ranks(4, "support.sharded_cases:resumed", folder=second, steps=14, model=model)
    assert two[0]["first"] == 4 and again[0]["first"] == 10
    if model not in UNEQUAL:
        for mine in (two[0], again[0]):
            errors = [relative(a, b) for a, b in zip(mine["tensors"], alone["tensors"], strict=True)]
            assert max(errors) <= 1e-9, errors


def test_a_training_of_four_ranks_goes_on_alone(tmp_path: Path) -> None:
    folder = sharded_cases.folder_of(tmp_path / "checkpoint")
    whole = run_ranks(4, "support.sharded_cases:saved", folder=folder, steps=10, at=5)
    for other in (
        sharded_cases.resumed(folder, 10),
        run_ranks(2, "support.sharded_cases:resumed", folder=folder, steps=10)[0],
    ):
        errors = [relative(a, b) for a, b in zip(other["tensors"], whole[0]["tensors"], strict=True)]
        assert max(errors) <= 1e-9, errors
