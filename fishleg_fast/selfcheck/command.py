"""What ``python -m fishleg_fast --check`` and ``--tune`` do."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence

import torch

from ..backends import reference
from ..backends.protocol import Ops
from ..precision import PRECISIONS
from . import cache, dispatch
from .conversation import CannotStart
from .examination import Examination, Subject
from .families import FAMILIES
from .identity import identity
from .tuning.table import Tune, save, take_tuned_tiles, tune_of, use_tiles
from .verdict import REFERENCE, Finding, Verdict

Say = Callable[[str], object]

TILED = "triton"  # whose tiles are tuned

_ROW = "{:<10} {:<12} {:<10} {:>9} {:>10} {:>8}  {}"


def check(backends: Mapping[str, str], device: torch.device, say: Say, kept: bool) -> bool:
    """Check all ops of the backends on the device at all precisions, say what was found in a table, and whether all is
    right. ``kept``: in the cache too, for optimizers to come.
    """
    tune = take_tuned_tiles(device)
    subject = Subject(backends, device, torch.float32, tune.tiles, tune.fastest)
    say(f"{identity(device)['device']}: relative errors to float64, the largest of all cases")
    say(_ROW.format("backend", "op", "precision", "error", "reference", "limit", ""))
    right = True
    try:
        with Examination(subject) as examination:
            for precision in PRECISIONS:
                found: list[Finding] = []
                for finding in examination.findings(precision):
                    found.append(finding)
                    say(row(finding))
                right = right and not Verdict(found).faults()
                if kept:
                    dispatch.keep(subject, precision, Verdict(found))
    except CannotStart as error:
        say(f"it cannot be checked: {error}")
        return False
    return right


def row(f: Finding) -> str:
    """A finding as a row of the table."""
    error, own = (f"{max(each.values()):.1e}" if each else "" for each in (f.errors, f.reference))
    most = f"{f.limit:.0e}" if f.errors else ""
    return _ROW.format(f.backend, f.family, f.precision, error, own, most, f.fault or "right")


def tune(backends: Mapping[str, str], device: torch.device, precisions: Sequence[str], say: Say) -> bool:
    """Time the backends and the Triton kernels' tiles on the device, and keep the table of what is fastest for
    optimizers to come; whether it is kept. What is wrong is left out, and the pinned tiles count where tuned ones are.
    """
    from .tuning import search

    if cache.folder() is None:
        say(f"there is nowhere to keep a table: set {cache.VARIABLE} to a folder")
        return False
    say(f"{identity(device)['device']}: seconds of kernels, at precisions {', '.join(precisions)}")
    old, new = tune_of(device), Tune()
    ops: dict[str, Ops] = {name: pkgutil.resolve_name(place) for name, place in backends.items()}
    if TILED in ops:
        for precision in precisions:
            new = search.merged(new, search.tuned_tiles(precision, device, ops[TILED], say))
    table = search.merged(old, new)
    for precision in precisions:
        verdict = dispatch.examined(Subject(backends, device, torch.float32, table.tiles), precision)
        if new.tiles and any(f.backend == TILED for f in verdict.faults()):
            say(f"the tuned tiles are left out, for with them {verdict.faults()[0]}")
            table, new = old, Tune()
            verdict = dispatch.examined(Subject(backends, device, torch.float32, table.tiles), precision)
        if verdict.unchecked is not None:
            say(f"it cannot be checked: {verdict.unchecked}")
            return False
        use_tiles(device, table.tiles)
        right = {name: [family for family in FAMILIES if verdict.right(name, family)] for name in ops}
        right[REFERENCE] = list(FAMILIES)
        found = search.fastest_backends({**ops, REFERENCE: reference}, right, precision, device, say)
        table = search.merged(table, found)
    path = save(device, table)
    say(f"kept in {path}" if path else "the table could not be kept")
    return path is not None
