"""float32 product precision for the optimizer's own products only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# precision -> what torch.set_float32_matmul_precision sets for oneDNN (CPU) and cuBLAS
PRECISIONS = {"highest": ("ieee", "ieee"), "high": ("tf32", "tf32"), "medium": ("bf16", "tf32")}


@contextmanager
def precision_scope(precision: str) -> Iterator[None]:
    """float32 products at ``precision`` inside, and at the user's settings again outside.

    By the settings of each backend, which hold whether the user chose by them or by ``set_float32_matmul_precision``.
    """
    places = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    for place, value in zip(places, PRECISIONS[precision], strict=True):
        place.fp32_precision = value
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value
