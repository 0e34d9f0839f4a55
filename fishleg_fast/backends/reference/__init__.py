"""The ops in plain torch: the ground truth that others are tested against, and the fallback where there is none.

What the ops compute is said in ``backends.protocol``, what a structure computes in ``algebra``.
"""

from __future__ import annotations

import torch

from ..protocol import Availability
from .anchoring import average_moments as average_moments
from .anchoring import natural_step as natural_step
from .anchoring import start_kfac as start_kfac
from .lambda_update import lambda_step as lambda_step
from .products import inner as inner
from .products import qv as qv
from .products import refresh as refresh
from .theta_update import theta_step as theta_step


def available(device: torch.device | None = None, dtype: torch.dtype | None = None) -> Availability:
    """Always: plain torch runs wherever torch does."""
    return Availability(True, "plain torch")
