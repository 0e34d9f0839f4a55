"""The ``cuda`` backend: our own CUDA kernels (csrc/cuda), a plan for a list of blocks, and one call a step.

Theirs are ``Kron`` and ``Diagonal`` blocks with λ in float32, dense factors, and parameters and gradients in float32,
bfloat16 or float16, read and written where they are. ``coverage`` says which blocks are not: those go through the
reference's functions in the same op, with the same decision, norms and trust scale. Nothing waits for the device,
but for counters of steps that are on the CPU (``capturable=False``), and nothing is uploaded: kernels get what they are
told by value. A plan is found again by its blocks and their λ; where parameters, gradients and moments are, and how
they lie, is looked at in every step.

A plan has one workspace: steps of one optimizer on several streams have to be ordered by the caller. ``refresh`` always
forms both P and S of a block. The kernels have been tested as compiled for the CPU and by ptxas's report, but not on a
device yet.
"""

from __future__ import annotations

import torch

from ... import native
from ..protocol import Availability
from ..reference import average_moments as average_moments
from ..reference import natural_step as natural_step
from ..reference import start_kfac as start_kfac
from .coverage import TYPES
from .lambda_update import lambda_step as lambda_step
from .products import inner as inner
from .products import qv as qv
from .products import refresh as refresh
from .theta_update import theta_step as theta_step

LEAST_CAPABILITY = (8, 0)


def available(device: torch.device | None = None, dtype: torch.dtype | None = None) -> Availability:
    """Whether the extension has CUDA kernels and a device for them, and why not."""
    ok, reason = native.available()
    if not ok:
        return Availability(False, reason)
    if not native.features()["cuda"]:
        return Availability(*native.cuda_status())
    if device is not None and device.type != "cuda":
        return Availability(False, f"its kernels are for CUDA devices, not for {device.type}")
    if dtype is not None and dtype not in TYPES:
        return Availability(False, f"it has no kernels for parameters of {dtype}")
    if not torch.cuda.is_available():
        return Availability(False, f"torch finds no CUDA device ({native.cuda_status()[1]})")
    ok, detail = native.cuda_status()
    if ok and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return Availability(
            False, f"its kernels need compute capability {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} (A100) or newer"
        )
    return Availability(ok, detail)
