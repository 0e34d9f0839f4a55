"""The ``cpp`` backend: the passes over memory of a step in C++ (csrc/cpu), on torch's threads.

Products of Kron blocks are packed ones (``packed_products``) where the processor has an engine for them, and torch's
elsewhere. The reference takes an operation of torch for every few elements' arithmetic and every block; here all blocks
take two passes, one for the norms and one that writes.

A convolution's weight in ``channels_last`` or another layout that is no matrix is copied there and back.
"""

from __future__ import annotations

import torch

from ... import native
from ..protocol import Availability
from ..reference import natural_step as natural_step
from .anchoring import average_moments as average_moments
from .anchoring import start_kfac as start_kfac
from .lambda_update import lambda_step as lambda_step
from .products import inner as inner
from .products import qv as qv
from .products import refresh as refresh
from .theta_update import theta_step as theta_step


def available(device: torch.device | None = None, dtype: torch.dtype | None = None) -> Availability:
    """Where the extension is built, for parameters on the CPU."""
    if device is not None and device.type != "cpu":
        return Availability(False, f"it runs on the CPU, not on {device.type}")
    found = native.available()
    if not found.supported:
        return found
    return Availability(True, f"C++, compiled for {native.extension().instruction_set()}")
