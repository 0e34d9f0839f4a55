"""float32 product precision for the optimizer's own products only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = ("highest", "high", "medium")


@contextmanager
def precision_scope(precision: str) -> Iterator[None]:
    """``torch.set_float32_matmul_precision(precision)`` inside, and the user's setting again outside."""
    before = torch.get_float32_matmul_precision()
    if before == precision:
        yield
        return
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
