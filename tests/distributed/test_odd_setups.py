"""Several processes, used as users do: what cannot keep ranks equal is refused, and what can keeps them so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from support.odd_setups import EQUAL, REFUSED, not_a_member
from support.ranks import once, run_ranks


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    names = [case.__name__ for case in (*EQUAL, *REFUSED, not_a_member)]
    return once(tmp_path_factory, __name__, lambda: run_ranks(2, "support.odd_setups:everything", names=names))


@pytest.mark.parametrize("case", EQUAL)
def test_ranks_stay_equal(case: Callable, told: list[dict[str, Any]]) -> None:
    assert [mine[case.__name__] for mine in told] == [True, True]


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_let_ranks_drift_apart_is_refused(case: Callable, told: list[dict[str, Any]]) -> None:
    for mine in told:
        with pytest.raises(AssertionError, match=REFUSED[case]):
            raise AssertionError(mine[case.__name__])


def test_a_process_that_is_not_in_the_group_is_refused(told: list[dict[str, Any]]) -> None:
    assert told[0]["not_a_member"] is True and "process_group" in str(told[1]["not_a_member"])
