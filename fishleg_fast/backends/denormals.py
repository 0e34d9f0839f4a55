"""Denormal numbers as zeros: each takes a CPU a hundred cycles, and what has decayed so far tells nothing any more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .. import native

_DENORMAL = 1e-40  # in float32


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Denormal operands and results of CPU arithmetic count as zero inside: on this thread and on torch's workers.

    Each thread's own setting is back outside. Without the extension, or on a processor whose setting it does not know,
    on this thread alone, as torch can.
    """
    ok, _ = native.available()
    if ok and native.extension().can_flush_denormals():
        settings = native.extension().flush_denormals(torch.get_num_threads())
        try:
            yield
        finally:
            native.extension().restore_denormals(settings)
        return
    tiny = torch.full((1,), _DENORMAL, dtype=torch.float32, device="cpu")
    before = bool(tiny * 1 == 0)  # torch tells no other way
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
