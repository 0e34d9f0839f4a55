"""When to try again what has failed."""

from __future__ import annotations

MOST = 2**16  # calls between two attempts


class Attempts:
    """A way that may fail, for good or in passing: after n failures in a row it is left out 1, 2, 4, … 2ⁿ⁻¹ times."""

    def __init__(self) -> None:
        self.failures = 0  # in a row
        self._left_out = 0

    def due(self) -> bool:
        """Whether to try it now. Asked once at each occasion."""
        if self._left_out:
            self._left_out -= 1
        return not self._left_out

    def failed(self) -> None:
        self._left_out = min(2**self.failures, MOST) + 1
        self.failures += 1

    def worked(self) -> None:
        self.failures = 0
