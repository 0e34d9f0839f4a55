"""What happens on all ranks when one has trouble, and when a training goes on with another number of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fishleg_fast.distributed.ranks import Ranks
from support import distributed_cases
from support.dense import relative
from support.ranks import RanksFailed, once, run_ranks

RAISED = {
    "another rate": "parameter groups is .*'0.01'.* on rank 0 and .*'0.02'.* on rank 1",
    "another model": "the number of blocks is . on rank 0 and . on rank 1",
    "other parameters": r"the size of the parameters of 0 is \[.*\] on rank 0 and",
    "no_sync": r"outside of no_sync\(\)",
    "join": r"join\(\) is not supported",
}
WENT_ON = ("nan in a pass", "empty", "nan")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    kinds = [*RAISED, *WENT_ON, "a pass raises"]
    return once(tmp_path_factory, __name__, lambda: run_ranks(2, "support.distributed_cases:faults", kinds=kinds))


@pytest.mark.parametrize("kind", RAISED)
def test_what_cannot_work_is_refused_by_name_on_all_ranks(kind: str, found: list[dict[str, dict]]) -> None:
    for mine in found:
        ((step, _, message),) = mine[kind]["raised"]
        with pytest.raises(AssertionError, match=RAISED[kind]):
            raise AssertionError(message)
        assert step <= 0


def test_a_pass_that_raises_ends_all_ranks_at_once(found: list[dict[str, dict]]) -> None:
    first, last = (mine["a pass raises"]["raised"] for mine in found)
    assert first == [(4, "RuntimeError", "1 of 2 ranks failed in a pass of FishLeg's: see theirs")]
    assert last == [(4, "RuntimeError", "out of luck")]


@pytest.mark.parametrize("kind", WENT_ON)
def test_ranks_stay_equal_whatever_one_of_them_sees(kind: str, found: list[dict[str, dict]]) -> None:
    first, second = (mine[kind] for mine in found)
    assert not first["raised"] and not second["raised"] and first["counts"] == second["counts"]
    assert all(
        torch.equal(a, b) and torch.isfinite(a).all() for a, b in zip(first["tensors"], second["tensors"], strict=True)
    )


def test_what_one_rank_sees_is_skipped_or_postponed_by_all(found: list[dict[str, dict]]) -> None:
    counts = {kind: found[0][kind]["counts"] for kind in WENT_ON}
    # updates of λ before steps 0, 2, 4, 6; anchoring before 0 and 4, what falls on an empty batch one later
    assert counts["nan in a pass"] == dict(steps=8, aux_steps=4, anchors=2, skipped_steps=0, skipped_aux_steps=1)
    assert counts["empty"] == dict(steps=8, aux_steps=4, anchors=2, skipped_steps=0, skipped_aux_steps=0)
    assert counts["nan"]["skipped_steps"] == 1


def test_a_rank_that_dies_ends_the_others() -> None:
    with pytest.raises(RanksFailed, match="rank 1 ended with -9") as told:
        run_ranks(2, "support.distributed_cases:killed", patience=60.0)
    assert "rank 0 ended with 1" in str(told.value) and "Error" in str(told.value)


def test_a_training_goes_on_with_more_ranks_and_alone(tmp_path: Path) -> None:
    whole = run_ranks(2, "support.distributed_cases:resumed", folder=str(tmp_path), steps=10, saved=True)
    more = run_ranks(4, "support.distributed_cases:resumed", folder=str(tmp_path), steps=5, saved=False)
    alone = distributed_cases.resumed(str(tmp_path), 5, saved=False)
    for other in (more[0], alone):
        errors = [relative(a, b) for a, b in zip(other["tensors"], whole[0]["tensors"], strict=True)]
        assert max(errors) <= 1e-9, errors
    seeds = [tuple(rank["seeds"]) for rank in (*whole, *more[2:], alone)]
    assert seeds[0] == seeds[4] and len(set(seeds)) == 4  # each rank draws labels of its own, also after a checkpoint


def test_a_pass_s_own_error_is_not_lost_where_ranks_can_agree_on_nothing_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pass that ranks take together has failed on this one, so that the others meet it at another place."""
    ranks = Ranks()
    ranks.size = 2

    def lost(values: list[float]) -> list[float]:
        raise RuntimeError("Timed out")

    monkeypatch.setattr(ranks, "sums", lost)

    def fails() -> None:
        raise ValueError("out of luck")

    with pytest.raises(ValueError, match="out of luck") as told:
        ranks.each(fails)
    assert str(told.value.__cause__) == "Timed out"
    with pytest.raises(RuntimeError, match="Timed out"):
        ranks.each(lambda: None)
