"""What a plan counts is what ranks send and hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fishleg_fast import FishLeg, GaussianLikelihood
from fishleg_fast.__main__ import main
from fishleg_fast.model.assemble import build_blocks
from fishleg_fast.sharded.owners import assign_owners, state_entries
from fishleg_fast.sharded.plan import Route, plan, transformer_7b
from support.ranked_models import Gpt, mlp
from support.ranks import run_ranks
from support.sharded_cases import state_bytes

KINDS = {"DDP": {}, "DDP, shard_state=True": {"shard_state": True}, "fully_shard": {"copies": 1}}
FISHLEGS = ("all-reduce", "reduce", "broadcast", "all-to-all")  # collectives of the optimizer's own


def route(model: nn.Module, ranks: int, name: str) -> Route:
    every = {"update_aux_every": 1, "anchor_every": 1, "limit_every": 1}
    (found,) = (r for r in plan(model, ranks, **every).routes if r.name == name)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_what_is_sent_is_what_is_counted(ranks: int) -> None:
    """By collective, on average over ranks: in a step alone, and one that is measured, learns, anchors too."""
    found = run_ranks(ranks, "support.sharded_cases:handed", kinds=KINDS)
    alone = ("gradients", "updates")
    kinds = alone, (*alone, "limit"), (*alone, "v", "F v"), (*alone, "v", "F v", "moments")
    for name in KINDS:
        counted = route(Gpt(32), ranks, name).traffic
        for at, parts in enumerate(kinds):
            for collective in FISHLEGS:
                want = sum(t.payload for t in counted if t.collective == collective and t.what in parts)
                mine = sum(rank[name][at].get(collective, 0) for rank in found) / ranks
                assert mine == pytest.approx(want, rel=0.03), (name, at, collective)


@pytest.mark.parametrize("copies", [2, 3, 4, 7])
def test_state_that_is_counted_is_what_is_held(copies: int) -> None:
    net = Gpt()
    optimizer = FishLeg(net, likelihood=GaussianLikelihood(), normalize="rms", update_aux_every=10)
    for b in optimizer.blocks:
        b.structure.refresh(None)
    alone = state_bytes(optimizer)
    assert route(Gpt(), copies, "DDP").memory == pytest.approx(alone, rel=0.05)
    assert route(Gpt(), copies, "fully_shard").memory >= alone / copies


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 40])
def test_blocks_are_shared_out_evenly(ranks: int) -> None:
    for make in (mlp, Gpt):
        blocks = build_blocks(net := make(), list(net.parameters()), "kron", "auto")
        owners = assign_owners(blocks, ranks)
        loads = [sum(state_entries(b) for b, o in zip(blocks, owners, strict=True) if o == r) for r in range(ranks)]
        assert max(loads) <= sum(loads) / ranks + max(map(state_entries, blocks))
        assert owners == assign_owners(blocks, ranks)


def test_a_transformer_of_seven_billion() -> None:
    found = plan(transformer_7b(), 8)
    assert found.parameters == 6_738_415_616
    ddp, owned, sharded = found.routes
    assert owned.memory == sharded.memory < 1.2 * ddp.memory / 8
    assert "8 ranks, 6,738,415,616 parameters" in str(found)


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--plan", "support.ranked_models:mlp", "--ranks", "2", "3"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("2 ranks, 171 parameters") and "\n3 ranks" in told and "fully_shard" in told
    for wrong in (["--plan", "nothing"], ["--plan", "--ranks", "0"], ["--plan", "support.ranked_models:none"]):
        with pytest.raises(SystemExit):
            main(wrong)
    with pytest.raises(ValueError, match="ranks should be at least 1 but is: 0"):
        plan(mlp(), 0)


def test_nothing_is_allocated() -> None:
    with torch.device("meta"):
        assert plan(nn.Linear(10**6, 10**6), 3).parameters == 10**12 + 10**6
