"""The table of backends. No other file knows which exist.

Best first. Of those with kernels for a device that no one else has run, only what a check on that very device finds
right is taken by default (``selfcheck``).
"""

from __future__ import annotations

import logging
import pkgutil
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch

from . import cpu, cuda, reference
from .protocol import Availability, AvailabilityCheck, Ops


class Backend(NamedTuple):
    """Whether it can run, found out without importing what only its ops need; and where its ops are.

    place: as ``pkgutil.resolve_name`` takes it; the colon has it say why a module cannot be imported. kinds: the types
    of devices on which it is taken by default, None for all. checked: whether only after a check.
    """

    available: AvailabilityCheck
    place: str
    kinds: tuple[str, ...] | None = None
    checked: bool = False

    def ops(self) -> Ops:
        """Its ops, imported where they were not."""
        return pkgutil.resolve_name(self.place)


def _triton_available(device: torch.device | None = None, dtype: torch.dtype | None = None) -> Availability:
    from ..kernels.availability import available

    return available(device, dtype)


BACKENDS = {
    "triton": Backend(_triton_available, "fishleg_fast.kernels.backend:", ("cuda",), checked=True),
    "cuda": Backend(cuda.available, "fishleg_fast.backends.cuda:", ("cuda",), checked=True),
    "cpp": Backend(cpu.available, "fishleg_fast.backends.cpu:"),
    "reference": Backend(reference.available, "fishleg_fast.backends.reference:"),
}

_log = logging.getLogger("fishleg_fast")
_told: set[tuple[str, ...]] = set()


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


def defaults(device: torch.device, dtype: torch.dtype) -> tuple[dict[str, str], str]:
    """What is taken on ``device`` with parameters of ``dtype``, best first: those that have to be checked, with where
    their ops are, and the first that has not.
    """
    usable = [
        name
        for name, row in BACKENDS.items()
        if (row.kinds is None or device.type in row.kinds) and available(name, device, dtype).supported
    ]
    sure = next(name for name in usable if not BACKENDS[name].checked)
    return {name: BACKENDS[name].place for name in usable[: usable.index(sure)]}, sure


def choose(
    name: str | None,
    device: torch.device,
    dtype: torch.dtype,
    precision: str | None = None,
    others: Iterable[torch.dtype] = (),
) -> tuple[str, Ops]:
    """The backend's name and ops. None takes the best available one, on a GPU op by op what a check at ``precision``
    finds right there ("triton+reference" where that is not all), and logs which, once; it warns, once, of what is not.

    ``others``: dtypes that some of the parameters have.

    ValueError for an unknown name, RuntimeError for a named backend that is unavailable.
    """
    if name is not None:
        return name, _named(name, device, dtype)
    doubtful, best = defaults(device, dtype)
    if not doubtful:
        why = "python -m fishleg_fast says why others are unavailable"
        _tell((best, device.type), f"backend {best!r} on {device.type} ({why})")
        return best, BACKENDS[best].ops()
    from ..selfcheck.dispatch import default_ops

    covered = [d for d in others if d != dtype and all(available(b, device, d).supported for b in doubtful)]
    found = default_ops(doubtful, device, [dtype, *covered], precision)
    _tell((found.name, str(device), str(precision)), f"backend {found.name!r} on {device}, {found.figures}")
    if found.warning is not None and (found.warning,) not in _told:
        _told.add((found.warning,))
        warnings.warn(found.warning, stacklevel=3)
    return found.name, found.ops


def _named(name: str, device: torch.device, dtype: torch.dtype) -> Ops:
    """The ops of a backend that the user names, unchecked."""
    found = available(name, device, dtype)
    if not found.supported:
        raise RuntimeError(
            f"backend={name!r} is unavailable for {dtype} on {device}: {found.reason}. Choose backend=None for "
            f"the best available one"
        )
    if BACKENDS[name].checked and device.type == "cuda":
        from ..selfcheck.tuning.table import take_tuned_tiles

        take_tuned_tiles(device)
    return BACKENDS[name].ops()


def _tell(about: tuple[str, ...], text: str) -> None:
    """Log it once."""
    if about not in _told:
        _told.add(about)
        _log.info("%s", text)
