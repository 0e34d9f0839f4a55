"""Is it right? Every backend's ops on the device against the reference in float64, by structure and precision.

What is compared, and what is right, is the self-check's: ``fishleg_fast.selfcheck.cases``.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from fishleg_fast.algebra.structures.kron import Kron
from fishleg_fast.backends import reference, registry
from fishleg_fast.backends.protocol import Ops
from fishleg_fast.selfcheck.cases import Case, Draws, OddShapes, exercise, limit, relative
from fishleg_fast.selfcheck.families import FAMILIES

STRUCTURES: dict[str, Any] = {
    "kron": "kron",
    "kron-scaled": partial(Kron, scale=True),
    "diagkron": "diagkron",
    "sumkron": "sumkron",
    "diagonal": "diagonal",
}


def errors(device: torch.device, ops: Ops, precision: str, structure: str, scale: int) -> dict[str, float]:
    """The relative error of each kernel family on layers of odd shapes."""
    case, draws = Case(partial(OddShapes, scale), STRUCTURES[structure]), Draws(device)
    got = exercise(case, draws, torch.float32, ops, precision, list(FAMILIES))
    want = exercise(case, draws, torch.float64, reference, "highest", list(FAMILIES))
    # A cache that a backend does not fill is not an error of its products.
    return {family: relative(got[family], exact) for family, exact in want.items() if exact}


def check_task(device: torch.device, backend: str, precision: str, structure: str, scale: int) -> dict[str, Any]:
    """Relative errors of one backend, and whether all are within the limits of the precision."""
    _, ops = registry.choose(backend, device, torch.float32)
    found = errors(device, ops, precision, structure, scale)
    limits = {family: limit(family, precision, torch.float32) for family in found}
    return {
        "errors": {family: e if math.isfinite(e) else None for family, e in found.items()},
        "limit": limits["qv"],
        "limits": limits,
        "right": all(e <= limits[family] for family, e in found.items()),
    }
