"""When to try again what has failed, and to check what has worked."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

MOST = 2**16  # calls between two attempts


class Attempts:
    """A way that may fail, for good or in passing: after n failures in a row it is left out 1, 2, 4, … 2ⁿ⁻¹ times.

    Its results are checked now and then. Where one is wrong it is left out as long as the model's mode is what it was.
    """

    def __init__(self) -> None:
        self.failures = 0  # in a row
        self._left_out = 0
        self._mode: Hashable = None
        self._ruled_out = False
        self._checked = 0

    def state(self) -> tuple[Any, ...]:
        """Plain data, of which ``load`` makes the same again."""
        return self.failures, self._left_out, self._mode, self._ruled_out, self._checked

    def load(self, state: tuple[Any, ...]) -> Attempts:
        self.failures, self._left_out, self._mode, self._ruled_out, self._checked = state
        return self

    def due(self, mode: Hashable = None) -> bool:
        """Whether to try it now, in this mode of the model. Asked once at each occasion."""
        if self._ruled_out:
            if mode == self._mode:
                return False
            self._ruled_out = False
        if self._left_out:
            self._left_out -= 1
        return not self._left_out

    def failed(self) -> None:
        self._left_out = min(2**self.failures, MOST) + 1
        self.failures += 1
        self._checked = 0

    def rule_out(self) -> None:
        """What it gave was checked and wrong: that does not pass, but with the mode."""
        self._ruled_out = True
        self._checked = 0

    def worked(self) -> None:
        self.failures = 0

    def check_due(self, mode: Hashable) -> bool:
        """Whether to check this result: the first three in a mode, and the 4th, 8th, 16th, … Asked once of each."""
        if mode != self._mode:
            self._mode, self._checked = mode, 0
        self._checked += 1
        return self._checked <= 3 or not self._checked & (self._checked - 1)
