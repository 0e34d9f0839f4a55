"""The rows that describe blocks to the Triton kernels: what a list of fields gives the kernels and the host."""

from __future__ import annotations

import copy

import pytest

tl = pytest.importorskip("triton.language")

from fishleg_fast.kernels.device import row_layout  # noqa: E402
from fishleg_fast.kernels.device.row_layout import Fields  # noqa: E402


class Ascending(Fields):
    A: int
    B: int


class Descending(Fields):
    B: int
    A: int


def test_a_row_is_packed_by_name() -> None:
    assert Ascending().pack(B=2, A=1) == Descending().pack(A=2, B=1) == (1, 2)
    assert (Ascending().A, Ascending().B, Ascending().LENGTH) == (0, 1, 2)
    for wrong in ({"A": 1}, {"A": 1, "C": 2}, {"A": 1, "B": 2, "C": 3}):
        with pytest.raises(TypeError, match="fields are missing, or unknown"):
            Ascending().pack(**wrong)


def test_triton_sees_the_layout() -> None:
    """It hashes constexpr globals by their text, and compares them with copies at each launch."""
    assert repr(Ascending()) != repr(Descending())
    for fields in (Ascending(), row_layout.F, row_layout.H, row_layout.K, row_layout.PAIR):
        assert isinstance(fields, tl.constexpr) and copy.deepcopy(fields) == fields
        assert all(getattr(fields, name) == k for name, k in fields.value._asdict().items())
