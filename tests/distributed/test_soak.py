"""A long training with trouble on the way, and one that was broken off and goes on from a checkpoint: the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support.ranks import run_ranks

KINDS: dict[str, dict[str, Any]] = {"fully_shard": {"copies": 1}, "shard_state": {"shard_state": True}, "ddp": {}}
WHERE = "support.sharded_cases:soak"


@pytest.mark.parametrize("kind", KINDS)
def test_three_hundred_steps(kind: str, tmp_path: Path) -> None:
    folder, given = str(tmp_path), KINDS[kind]
    whole = run_ranks(2, WHERE, folder=folder, steps=300, **given)
    run_ranks(2, WHERE, folder=folder, steps=170, save_every=50, **given)
    resumed = run_ranks(2, WHERE, folder=folder, steps=300, go_on_from=150, **given)
    assert whole[0]["told"]["skipped_steps"] > 5 and whole[0]["told"]["anchors"] > 50
    for mine in (whole[1], *resumed):
        assert mine["told"] == whole[0]["told"]
        for a, b in zip(mine["tensors"], whole[0]["tensors"], strict=True):
            assert torch.equal(a, b) and torch.isfinite(a).all()
