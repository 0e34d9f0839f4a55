"""What backends keep on a block."""

from __future__ import annotations

import copy

import pytest
import torch

from fishleg_fast.model.block import BackendState, advance
from support.blocks import make_blocks


class One(BackendState):
    """Of one backend."""


class Other(One):
    """Of another."""


def test_each_backend_keeps_its_own() -> None:
    block, *_ = make_blocks()
    one, other = block.kept(One), block.kept(Other)
    assert type(one) is One and type(other) is Other
    assert block.kept(One) is one and block.kept(Other) is other


def test_a_copied_block_starts_without() -> None:
    block, *_ = make_blocks()
    one = block.kept(One)
    one.memory = object()  # type: ignore[attr-defined]
    found = copy.deepcopy(block).kept(One)
    assert found is not one and not hasattr(found, "memory") and block.kept(One) is one


class Boolean:
    """Counts how often a boolean crosses over to another device."""

    def __init__(self, value: bool) -> None:
        self.value, self.crossings = value, 0

    def to(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        self.crossings += 1
        return torch.tensor(self.value, dtype=dtype, device=device)


@pytest.mark.parametrize("ok", [True, False])
def test_counters_advance_by_one_look_at_the_decision_each_device(ok: bool) -> None:
    counters = [torch.tensor(float(k)) for k in range(5)]
    told, elsewhere = Boolean(ok), [torch.zeros((), device="meta") for _ in range(3)]
    advance([*counters, *elsewhere], told)
    assert told.crossings == 2 and [float(t) for t in counters] == [k + ok for k in range(5)]
    advance(counters)
    assert [float(t) for t in counters] == [k + ok + 1 for k in range(5)]
    advance([])
