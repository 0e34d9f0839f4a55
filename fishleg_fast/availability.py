"""How a part that may be missing says whether it is there."""

from __future__ import annotations

from typing import NamedTuple


class Availability(NamedTuple):
    """Whether something can be used here, and what it found or why not."""

    supported: bool
    reason: str
