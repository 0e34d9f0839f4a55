"""Ops that a self-check is to find wrong, or right: the reference's, but for one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from fishleg_fast.backends import reference
from fishleg_fast.selfcheck import child


class Faulty:
    """The reference with other functions in the place of some."""

    def __init__(self, **functions: Callable[..., Any]) -> None:
        self.functions = functions

    def __getattr__(self, name: str) -> Any:
        return self.functions.get(name) or getattr(reference, name)


def off_by_one_percent(blocks, us):
    return [v * 1.01 for v in reference.qv(blocks, us)]


def raises(*args):
    raise RuntimeError("no kernel image is available")


def hangs(*args):
    time.sleep(3600)


def dies(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def spoils(*args):
    """As an illegal access: neither this call nor any later one on the device works."""
    child.usable = lambda device: False
    raise RuntimeError("an illegal memory access was encountered")


def spectral(change: Callable[..., Any]) -> Callable[..., Any]:
    """A θ step that is something else with normalize="spectral"."""

    def theta_step(blocks, gs, options):
        return (change if options.normalize == "spectral" else reference.theta_step)(blocks, gs, options)

    return theta_step


RIGHT = Faulty()
WRONG = Faulty(qv=off_by_one_percent)
RAISING = Faulty(lambda_step=raises)
HANGING = Faulty(theta_step=spectral(hangs))
DYING = Faulty(refresh=dies)
SPOILING = Faulty(inner=spoils)
