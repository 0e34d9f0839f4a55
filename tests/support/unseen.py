"""What records passes of the optimizer's, which leave the lists and counters of models and hooks as they were."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class Unseen:
    """Entries out of reach: in no attribute by name."""

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: list[Any] = []

    def append(self, entry: Any) -> None:
        self._entries.append(entry)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
