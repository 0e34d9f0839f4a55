"""Forward mode, which torch loads at its first use."""

from __future__ import annotations

import warnings
from threading import Lock

import torch
import torch.autograd.forward_ad as forward_ad

_lock = Lock()
_loaded = False


def load() -> None:
    """Have torch load its forward derivatives, once a process.

    torch 2.13 warns of itself in this: of torch.jit.script, by which it compiles some. Where warnings are errors, every
    step would end there.
    """
    global _loaded
    with _lock:
        if not _loaded:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                with forward_ad.dual_level():
                    forward_ad.make_dual(torch.zeros((), device="cpu"), torch.zeros((), device="cpu"))
        _loaded = True
