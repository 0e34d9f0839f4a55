"""The table of backends. No other file knows which exist.

A backend is a module with the ops of ``fishleg_fast.reference.steps`` (same signatures) and ``available(device,
dtype)``. Best first. What follows the reference, which is always available, is chosen by name alone: no device has run
it yet.
"""

from __future__ import annotations

import importlib
import logging
from types import ModuleType

import torch

BACKENDS = {
    "cpp": "fishleg_fast.cpp",
    "reference": "fishleg_fast.reference",
    "triton": "fishleg_fast.kernels.backend",
    "cuda": "fishleg_fast.cuda",
}

# A module that answers for a backend whose own needs what may not be installed.
AVAILABILITY = {"triton": "fishleg_fast.kernels.availability"}

_log = logging.getLogger("fishleg_fast")
_told: set[tuple[str, str]] = set()


def available(name: str, device: torch.device | None = None, dtype: torch.dtype | None = None) -> tuple[bool, str]:
    """Whether the backend can run on ``device`` with parameters of ``dtype``, and why not.

    ValueError for an unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend should be one of {sorted(BACKENDS)} or None but is: {name!r}")
    try:
        module = importlib.import_module(AVAILABILITY.get(name, BACKENDS[name]))
    except ImportError as error:
        return False, f"it cannot be imported: {error}"
    return module.available(device, dtype)


def report() -> list[tuple[str, bool, str]]:
    """(name, whether it is available here, why or why not) of every backend, best first."""
    return [(name, *available(name)) for name in BACKENDS]


def choose(name: str | None, device: torch.device, dtype: torch.dtype) -> tuple[str, ModuleType]:
    """The backend's name and module. None takes the best available one and logs which, once.

    ValueError for an unknown name, RuntimeError for a named backend that is unavailable.
    """
    if name is not None:
        ok, reason = available(name, device, dtype)
        if not ok:
            raise RuntimeError(
                f"backend={name!r} is unavailable for {dtype} on {device}: {reason}. Choose backend=None for "
                f"the best available one"
            )
        return name, importlib.import_module(BACKENDS[name])
    best = next(n for n in BACKENDS if available(n, device, dtype)[0])
    if (best, device.type) not in _told:
        _told.add((best, device.type))
        _log.info("backend %r on %s (python -m fishleg_fast says why others are unavailable)", best, device.type)
    return best, importlib.import_module(BACKENDS[best])
