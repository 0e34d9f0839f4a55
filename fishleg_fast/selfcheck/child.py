"""The process in which kernels are checked: a line of JSON for every line that it is given.

What hangs or crashes here, or spoils the device's context, leaves the user's process alone.
"""

from __future__ import annotations

import json
import os
import pkgutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..backends.protocol import Ops
from . import cases
from .families import FAMILIES, composed, the_same
from .tuning.table import use_tiles
from .verdict import REFERENCE


class Checks:
    """Checks of ops on one device, against truth that is computed once."""

    def __init__(self, device: torch.device, dtype: torch.dtype, scale: str, backends: Mapping[str, Ops]) -> None:
        self.device, self.dtype = device, dtype
        self.cases = cases.SCALES[scale]
        self.draws = {name: cases.Draws(device) for name in self.cases}
        self.backends: dict[str, Ops] = {**backends, REFERENCE: reference}
        self.truths: dict[str, dict[str, list[Tensor]]] = {}
        self.references: dict[tuple[str, str], dict[str, float]] = {}

    def exercise(self, name: str, *how: Any) -> dict[str, list[Tensor]]:
        """What ops make of a case; see ``cases.exercise``."""
        return cases.exercise(self.cases[name], self.draws[name], *how)

    def found(self, name: str, ops: Ops, precision: str, families: Sequence[str]) -> dict[str, float]:
        """The relative error of each family in a case."""
        if name not in self.truths:
            self.truths[name] = self.exercise(name, torch.float64, reference, "highest", list(FAMILIES))
        got = self.exercise(name, self.dtype, ops, precision, families)
        return {family: cases.relative(mine, self.truths[name][family]) for family, mine in got.items()}

    def reference_errors(self, name: str, precision: str) -> dict[str, float]:
        """The reference's own."""
        if (name, precision) not in self.references:
            self.references[name, precision] = self.found(name, reference, precision, list(FAMILIES))
        return self.references[name, precision]

    def check(self, choice: Mapping[str, Mapping[str, str]], families: Sequence[str], precision: str) -> dict[str, Any]:
        """Errors of ``families``, computed by a choice of backends; the reference computes the others."""
        whole = {family: choice.get(family) or the_same(REFERENCE) for family in FAMILIES}
        ops = composed(whole, self.backends)
        limits = {family: cases.limit(family, precision, self.dtype) for family in families}
        errors, own, faults = {}, {}, []
        for name in self.cases:
            found = self.found(name, ops, precision, families)
            errors[name] = max(found[family] for family in families)
            own[name] = max(self.reference_errors(name, precision)[family] for family in families)
            faults += [
                f"is wrong in case {name!r}: {family} has a relative error of {found[family]:.1e}, more than {most:.0e}"
                for family, most in limits.items() if not found[family] <= most
            ]  # fmt: skip
        fault = faults[0] if faults else None
        return {"errors": errors, "reference": own, "limit": max(limits.values()), "fault": fault}


def answer(checks: Checks, item: Mapping[str, Any]) -> dict[str, Any]:
    """A finding's fields; whatever goes wrong is a fault."""
    start = time.perf_counter()
    try:
        found = checks.check(item["choice"], item["families"], item["precision"])
    except torch.OutOfMemoryError as error:
        found = {"fault": f"found too little memory: {_line(error)}", "lasting": False}
    except Exception as error:
        found = {"fault": f"raised {type(error).__name__}: {_line(error)}"}
    return {**found, "seconds": time.perf_counter() - start}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def usable(device: torch.device) -> bool:
    """Whether the device's context still works: after an illegal access nothing does."""
    try:
        return float(torch.ones((), device=device)) == 1
    except RuntimeError:
        return False


def main(request: Mapping[str, Any]) -> None:
    """Answer the lines of standard input; exit where the device is spoilt. What else is printed goes to stderr."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(value: Mapping[str, Any]) -> None:
        print(json.dumps(value), file=channel, flush=True)

    device = torch.device(request["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not usable(device):
        say({"unusable": f"no context can be made on {device}"})
        return
    use_tiles(device, request["tiles"])
    backends: dict[str, Ops] = {}
    failed = {}
    for name, place in request["backends"].items():
        try:
            backends[name] = pkgutil.resolve_name(place)
        except Exception as error:
            failed[name] = f"cannot be imported: {type(error).__name__}: {_line(error)}"
    checks = Checks(device, getattr(torch, request["dtype"]), request["scale"], backends)
    say({"ready": True})
    for line in sys.stdin:
        item = json.loads(line)
        names = {name for by_class in item["choice"].values() for name in by_class.values()}
        missing = [failed[name] for name in sorted(names) if name in failed]
        found = {"fault": missing[0]} if missing else answer(checks, item)
        spoilt = not usable(device)
        say({**found, "spoilt": spoilt})
        if spoilt:
            return
