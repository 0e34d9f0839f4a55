"""The table of backends. No other file knows which exist.

Best first. What follows the reference, which is always available, is chosen by name alone: no device has run it yet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import cpu, cuda, reference
from .protocol import Availability, AvailabilityCheck, Ops


class Backend(NamedTuple):
    """Whether it can run, found out without importing what only its ops need; and its ops."""

    available: AvailabilityCheck
    ops: Callable[[], Ops]


def _cpp() -> Ops:
    return cpu


def _reference() -> Ops:
    return reference


def _triton_available(device: torch.device | None = None, dtype: torch.dtype | None = None) -> Availability:
    from ..kernels.availability import available

    return available(device, dtype)


def _triton() -> Ops:
    from ..kernels import backend

    return backend


def _cuda() -> Ops:
    return cuda


BACKENDS = {
    "cpp": Backend(cpu.available, _cpp),
    "reference": Backend(reference.available, _reference),
    "triton": Backend(_triton_available, _triton),
    "cuda": Backend(cuda.available, _cuda),
}

_log = logging.getLogger("fishleg_fast")
_told: set[tuple[str, str]] = set()


def available(name: str, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Availability:
    """Whether the backend can run on ``device`` with parameters of ``dtype``, and why not.

    ValueError for an unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend should be one of {sorted(BACKENDS)} or None but is: {name!r}")
    try:
        return BACKENDS[name].available(device, dtype)
    except ImportError as error:
        return Availability(False, f"it cannot be imported: {error}")


def report() -> list[tuple[str, Availability]]:
    """Every backend's name, and whether it is available here; best first."""
    return [(name, available(name)) for name in BACKENDS]


def choose(name: str | None, device: torch.device, dtype: torch.dtype) -> tuple[str, Ops]:
    """The backend's name and ops. None takes the best available one and logs which, once.

    ValueError for an unknown name, RuntimeError for a named backend that is unavailable.
    """
    if name is not None:
        found = available(name, device, dtype)
        if not found.supported:
            raise RuntimeError(
                f"backend={name!r} is unavailable for {dtype} on {device}: {found.reason}. Choose backend=None for "
                f"the best available one"
            )
        return name, BACKENDS[name].ops()
    best = next(n for n in BACKENDS if available(n, device, dtype).supported)
    if (best, device.type) not in _told:
        _told.add((best, device.type))
        _log.info("backend %r on %s (python -m fishleg_fast says why others are unavailable)", best, device.type)
    return best, BACKENDS[best].ops()
