"""Which ops a device gets by default: those of its kernels that were found right there, once for all processes."""

from __future__ import annotations

import json
import logging
import pkgutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..backends import reference
from ..backends.protocol import Ops
from ..precision import PRECISIONS, kernel_precision
from . import cache
from .conversation import CannotStart
from .examination import Examination, Subject
from .families import FAMILIES, Choice, composed, used
from .identity import identity
from .tuning.table import take_tuned_tiles
from .verdict import REFERENCE, TOGETHER, Finding, Verdict

NAMES = {kernels: name for name, (_, _, kernels) in PRECISIONS.items()}  # what kernels multiply in -> precision

_log = logging.getLogger("fishleg_fast")
_lock = threading.Lock()
_known: dict[tuple[Path | None, str], Verdict] = {}  # of this process: by the cache folder and the verdict's key


class Default(NamedTuple):
    """A device's ops by default, their backends' names, what was found, and what the user has to know of it."""

    name: str
    ops: Ops
    figures: str
    warning: str | None


def default_ops(
    backends: Mapping[str, str], device: torch.device, dtypes: Sequence[torch.dtype], precision: str | None
) -> Default:
    """Ops of ``backends``, the first ones first, as far as they are right on the device with parameters of all dtypes;
    else the reference's.

    ``backends``: name -> where its ops are. ``precision``: of the optimizer; None: torch's setting. The first call on a
    device has them checked, in a process of its own: as long as Triton takes to compile, and some seconds.
    """
    if device == torch.device("cuda"):  # without a number
        device = torch.device("cuda", torch.cuda.current_device())
    name = NAMES[kernel_precision(precision)]
    with _lock:
        tune = take_tuned_tiles(device)
        subjects = [Subject(backends, device, dtype, tune.tiles, tune.fastest) for dtype in dtypes]
        found = [verdict_of(subject, name) for subject in subjects]
    subject, news = subjects[0], found[0][1]
    unchecked = [v.unchecked for v, _ in found if v.unchecked is not None]
    verdict = Verdict([finding for v, _ in found for finding in v.findings], next(iter(unchecked), None))
    choice = verdict.choice(list(backends), tune.fastest.get(name, {}))
    places = {backend: pkgutil.resolve_name(backends[backend]) for backend in used(choice) if backend != REFERENCE}
    figures = f"{news} at precision {name!r}: {_figures(verdict)}"
    ops = composed(choice, {**places, REFERENCE: reference})
    return Default("+".join(used(choice)), ops, figures, _warning(verdict, choice, subject))


def key_of(subject: Subject, precision: str) -> dict[str, Any]:
    """What a verdict is about: it holds for that alone."""
    return {
        **subject.request(), "precision": precision, "fastest": subject.fastest.get(precision, {}),
        **identity(subject.device),
    }  # fmt: skip


def verdict_of(subject: Subject, precision: str) -> tuple[Verdict, str]:
    """This process's or the cache's, or else a new one, which is kept if it lasts; and which of these it is."""
    key = key_of(subject, precision)
    here = cache.folder(), json.dumps(key, sort_keys=True)
    if here in _known:
        return _known[here], "checked before"
    found, news = cache.load("verdict", key, Verdict.from_json), "checked before"
    if found is None:
        _log.info("checking %s on %s, once", ", ".join(subject.backends), key["device"])
        found, news = examined(subject, precision), "checked"
        keep(subject, precision, found)
    _known[here] = found
    return found, news


def examined(subject: Subject, precision: str) -> Verdict:
    """A new verdict, whatever happens to its process."""
    found: list[Finding] = []
    try:
        with Examination(subject) as examination:
            for finding in examination.findings(precision):
                found.append(finding)
    except CannotStart as error:
        return Verdict(found, str(error))
    return Verdict(found)


def keep(subject: Subject, precision: str, verdict: Verdict) -> None:
    """For other processes, if they would find the same."""
    if verdict.lasting:
        cache.save("verdict", key_of(subject, precision), verdict.as_json())


def _figures(verdict: Verdict) -> str:
    """One line: relative errors, by backend and family."""
    by_backend: dict[str, list[str]] = {}
    for f in verdict.findings:
        if f.backend != TOGETHER:
            by_backend.setdefault(f.backend, []).append(f"{f.family} {'wrong' if f.fault else f'{f.worst:.0e}'}")
    texts = [f"{backend}: {', '.join(each)}" for backend, each in by_backend.items()]
    return f"relative errors {'; '.join(texts) or 'unknown'} ({verdict.seconds:.1f} s)"


def _warning(verdict: Verdict, choice: Choice, subject: Subject) -> str | None:
    """What failed, what computes instead, and what to do; None where nothing did."""
    names = " and ".join(map(repr, subject.backends))
    if verdict.unchecked is not None:
        return (
            f"backends {names} cannot be checked on {subject.device}, so the reference computes: {verdict.unchecked}. "
            f"backend='triton' takes one without a check"
        )
    faults = verdict.faults()
    if not faults:
        return None
    texts = [f"{f.backend!r} {f.family} {f.fault}" for f in faults]
    instead = {family: " or ".join(dict.fromkeys(choice[family].values())) for family in FAMILIES}
    concerned = FAMILIES if any(f.backend == TOGETHER for f in faults) else dict.fromkeys(f.family for f in faults)
    return (
        f"kernels failed their check on {subject.device}: {'; '.join(texts)}. These compute instead: "
        f"{', '.join(f'{family} by {instead[family]}' for family in concerned)}. Please report it with what "
        f"python -m fishleg_fast --check prints, which checks them anew"
    )
