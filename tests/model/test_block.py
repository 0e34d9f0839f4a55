"""What backends keep on a block."""

from __future__ import annotations

import copy

from fishleg_fast.model.block import BackendState
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
