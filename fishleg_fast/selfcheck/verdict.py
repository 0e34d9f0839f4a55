"""What a check found: relative errors of a backend's families, and what became of those that gave none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .families import FAMILIES, Choice, the_same

REFERENCE = "reference"  # what everything falls back to
TOGETHER = "together"  # the backend's name in the finding of the composed ops


@dataclass(frozen=True)
class Finding:
    """One family of one backend at one precision, over all cases.

    errors: case -> relative error to float64. reference: the reference's own, at the same precision. limit: of errors.
    fault: why there is no error, or that it is too large; None: it is right. lasting: whether the fault is the
    kernel's, and not one of this moment's, such as a lack of memory.
    """

    backend: str
    family: str
    precision: str
    errors: dict[str, float] = field(default_factory=dict)
    reference: dict[str, float] = field(default_factory=dict)
    limit: float = math.inf
    fault: str | None = None
    lasting: bool = True
    seconds: float = 0.0

    @property
    def worst(self) -> float:
        """The largest error; infinite where there is none."""
        return max(self.errors.values(), default=math.inf)

    def __str__(self) -> str:
        return f"{self.family} {self.fault or f'{self.worst:.0e}'}"


@dataclass(frozen=True)
class Verdict:
    """All findings, and where the backends could not be checked at all, why."""

    findings: Sequence[Finding]
    unchecked: str | None = None

    @property
    def lasting(self) -> bool:
        """Whether the next process would find the same."""
        return self.unchecked is None and all(f.lasting for f in self.findings)

    @property
    def seconds(self) -> float:
        """What the checks themselves took, compiling included, and starting a process not."""
        return sum(f.seconds for f in self.findings)

    def faults(self) -> list[Finding]:
        """What is not right."""
        return [f for f in self.findings if f.fault is not None]

    def right(self, backend: str, family: str) -> bool:
        """Whether the family was found right."""
        found = [f for f in self.findings if (f.backend, f.family) == (backend, family)]
        return bool(found) and all(f.fault is None for f in found)

    def choice(self, order: Sequence[str], fastest: Choice) -> Choice:
        """Family -> shape class -> the backend that measured ``fastest`` if it was found right, else the first that
        was, else the reference; that everywhere where the families together are wrong, or not all is checked.
        """
        if self.unchecked is not None or any(f.fault is not None for f in self.findings if f.backend == TOGETHER):
            return {family: the_same(REFERENCE) for family in FAMILIES}
        chosen = {}
        for family in FAMILIES:
            right = [*(name for name in order if self.right(name, family)), REFERENCE]
            chosen[family] = the_same(right[0])
            chosen[family].update({kind: name for kind, name in fastest.get(family, {}).items() if name in right})
        return chosen

    def as_json(self) -> list[dict[str, Any]]:
        return [asdict(f) for f in self.findings]

    @classmethod
    def from_json(cls, value: Any) -> Verdict:
        """TypeError or ValueError where it is none."""
        findings = [Finding(**each) for each in value]
        if not findings or any(f.family not in (*FAMILIES, TOGETHER) for f in findings):
            raise ValueError("it holds no findings of the families")
        return cls(findings)
