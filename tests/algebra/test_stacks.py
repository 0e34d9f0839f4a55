"""Tensors of one shape as one: which are views, which keys go together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fishleg_fast.algebra import stacks
from fishleg_fast.algebra.stacks import alike, scalars, together

WHOLE = torch.arange(120.0)


def shares_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("tensors", "view"),
    [
        (list(WHOLE.reshape(5, 4, 6).unbind()), True),
        (list(WHOLE.reshape(5, 4, 6).mT.unbind()), True),  # transposed, each at the same distance
        (list(WHOLE.reshape(4, 5, 6).unbind(1)), True),
        (list(WHOLE.reshape(5, 4, 6).unbind())[1:4], True),
        (list(WHOLE.reshape(5, 4, 6).unbind())[::2], True),
        ([WHOLE[3]], True),
        ([WHOLE.reshape(5, 24)], True),
        (list(WHOLE.reshape(5, 4, 6).unbind())[::-1], False),
        ([WHOLE[:6], WHOLE[6:12], WHOLE[13:19]], False),
        ([WHOLE[:6], WHOLE[:6]], False),
        ([WHOLE[:6], WHOLE[6:12].clone()], False),
        ([WHOLE.clone()[:6], WHOLE.clone()[6:12]], False),
        ([WHOLE[:12].reshape(3, 4), WHOLE[12:24].reshape(4, 3).T], False),
        ([torch.ones(2), torch.zeros(2)], False),
    ],
)
def test_together_is_a_stack_and_a_view_where_it_can_be(tensors: list[Tensor], view: bool) -> None:
    found = together(tensors)
    assert torch.equal(found, torch.stack(tensors))
    assert shares_memory(found, tensors[0]) == view
    if view and len(tensors) > 1:
        for k, part in enumerate(found.unbind()):
            assert part.data_ptr() == tensors[k].data_ptr()


def test_scalars_are_as_wide_as_the_widest() -> None:
    narrow, wide = torch.tensor(1.0), torch.tensor(2.0, dtype=torch.float64)
    assert scalars([narrow, narrow]).dtype == torch.float32
    assert torch.equal(
        scalars([narrow, wide, torch.tensor(3.0, dtype=torch.bfloat16)]), torch.tensor([1, 2, 3.0]).double()
    )


def test_equal_keys_go_together_as_far_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "ENTRIES", 10)
    keys = ["a", "b", "a", None, "a", "b", None, "a"]
    assert alike(keys, [3] * 8) == [[0, 2, 4], [1, 5], [3], [6], [7]]
    assert alike(["a", "a", "a"], [11, 4, 4]) == [[0], [1, 2]]
    assert alike([], []) == []
