"""Checking backends on a device by a child process, restarted where a kernel hangs or crashes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .conversation import Conversation, NoAnswer
from .families import FAMILIES, Choice, the_same, used
from .tuning.table import Tiles
from .verdict import REFERENCE, TOGETHER, Finding, Verdict

SCALES = {"cuda": "full", "cpu": "modest"}  # type of device -> of cases


@dataclass(frozen=True)
class Subject:
    """What is checked: backends (name -> where its ops are, as ``pkgutil.resolve_name`` takes it) on a device."""

    backends: Mapping[str, str]
    device: torch.device
    dtype: torch.dtype
    tiles: Tiles = field(default_factory=dict)
    fastest: Mapping[str, Choice] = field(default_factory=dict)  # by precision: of those that are right, what is used

    def request(self) -> dict[str, Any]:
        """What the child is told first."""
        return {
            "backends": dict(self.backends), "device": str(self.device), "dtype": str(self.dtype).partition(".")[2],
            "tiles": self.tiles, "scale": SCALES[self.device.type],
        }  # fmt: skip


class Examination:
    """Findings about a subject. A context, at whose end the child ends."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._child: Conversation | None = None

    def __enter__(self) -> Examination:
        return self

    def __exit__(self, *error: object) -> None:
        if self._child is not None:
            self._child.end()

    def findings(self, precision: str) -> Iterator[Finding]:
        """Of every family of every backend, and then of those together that would be dispatched.

        CannotStart, at any time, where there is no child.
        """
        found: list[Finding] = []
        for backend in self.subject.backends:
            for family in FAMILIES:
                found.append(self.family(backend, family, precision))
                yield found[-1]
        choice = Verdict(found).choice(list(self.subject.backends), self.subject.fastest.get(precision, {}))
        if used(choice) != [REFERENCE]:
            yield self.together(choice, precision)

    def family(self, backend: str, family: str, precision: str) -> Finding:
        """One family of a backend, the others being the reference's."""
        answer = self._answer({family: the_same(backend)}, [family], precision)
        return Finding(backend, family, precision, **answer)

    def together(self, choice: Choice, precision: str) -> Finding:
        """All families as they would be dispatched."""
        return Finding(TOGETHER, TOGETHER, precision, **self._answer(choice, list(FAMILIES), precision))

    def _answer(self, choice: Choice, families: Sequence[str], precision: str) -> dict[str, Any]:
        if self._child is None or self._child.over:
            self._child = Conversation(self.subject.request())
        try:
            return self._child.ask({"choice": choice, "families": families, "precision": precision})
        except NoAnswer as fault:
            return {"fault": str(fault)}
