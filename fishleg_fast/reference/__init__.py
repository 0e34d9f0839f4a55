"""THE MATHS, in plain torch: the ground truth, and the fallback of every backend.

``factors``: Kronecker factors of each layout. ``products``: Q u, λ-gradients and caches of each structure.
``steps``: the ops over lists of blocks, whose signatures every backend copies.
"""

from __future__ import annotations

from .steps import anchor as anchor
from .steps import inner as inner
from .steps import lambda_step as lambda_step
from .steps import qv as qv
from .steps import refresh as refresh
from .steps import theta_step as theta_step


def available(device: object = None, dtype: object = None) -> tuple[bool, str]:
    """Always: plain torch runs wherever torch does."""
    return True, "plain torch"
