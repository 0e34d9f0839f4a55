"""Precision of the optimizer's own float32 products, by the names of ``torch.set_float32_matmul_precision``.

"highest" is float32. "high" and "medium" allow TF32, as torch's own names do on CUDA; today's CPUs have none, and stay
at float32. "medium" also rounds the operands of Q's products, and of the moments that Q starts from, to bfloat16 on a
CPU that has instructions for it: torch's own BF16 setting for CPUs is as coarse, and slower since it converts P and S
at every product.
Our own GPU kernels multiply in TF32 for "high" and in bfloat16 for "medium"; "tf32x3", which torch does not have, is
nearly float32 on tensor cores, and float32 wherever torch multiplies.

On CUDA the optimizer's products are at "high" where nobody says otherwise: torch's own default cannot be told from a
wish for "highest", and TF32 is exact enough for directions. The Cholesky roots of anchoring are float32, but for
"medium" on CPUs that multiply bfloat16, where operands are pairs of those (sixteen bits).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

# precision -> the settings of oneDNN (CPU) and cuBLAS, and what our own GPU kernels multiply in
PRECISIONS = {
    "highest": ("ieee", "ieee", "ieee"),
    "tf32x3": ("ieee", "ieee", "tf32x3"),
    "high": ("tf32", "tf32", "tf32"),
    "medium": ("tf32", "tf32", "bf16"),
}

_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def precision_scope(precision: str) -> Iterator[None]:
    """float32 products at ``precision`` inside, and at the user's settings again outside.

    By the settings of each backend, which hold whether the user chose by them or by ``set_float32_matmul_precision``.
    They are the process's: one thread at a time, lest another one's are taken for the user's.
    """
    places = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    with _ONE_AT_A_TIME:
        before = [place.fp32_precision for place in places]
        for place, value in zip(places, PRECISIONS[precision][:2], strict=True):
            place.fp32_precision = value
        try:
            yield
        finally:
            for place, value in zip(places, before, strict=True):
                place.fp32_precision = value


def own_precision(precision: str | None, device: torch.device) -> str | None:
    """At what the optimizer's products on ``device`` are for a user's ``precision``; None: at torch's setting."""
    on_cuda = device.type == "cuda" and torch.version.cuda is not None
    return "high" if precision is None and on_cuda and _setting() == "highest" else precision


@cache
def _fast_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware; without, torch is slower at it than at float32."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def operand_dtype(precision: str | None, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What the operands of Q's products are rounded to, for λ of ``dtype``. None follows torch's setting."""
    if device.type != "cpu" or dtype != torch.float32 or (precision or _setting()) != "medium":
        return dtype
    return torch.bfloat16 if _fast_bfloat16() else dtype


def kernel_precision(precision: str | None) -> str:
    """What our GPU kernels multiply float32 in: "ieee", "tf32x3", "tf32" or "bf16". None follows torch's setting."""
    return PRECISIONS[precision or _setting()][2]


def _setting() -> str:
    """torch.get_float32_matmul_precision(), which refuses to answer where it disagrees with a backend's own setting."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "medium" if torch.backends.mkldnn.matmul.fp32_precision == "bf16" else "highest"  # type: ignore[attr-defined]
