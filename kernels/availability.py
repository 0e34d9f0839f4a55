"""Whether the Triton backend can run, found out without importing Triton."""

from __future__ import annotations

import importlib.util
import os

import torch

from ..backends.protocol import Availability

_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


def available(device: torch.device | None = None, dtype: torch.dtype | None = None) -> Availability:
    """A CUDA device of compute capability 8.0, or Triton's interpreter on a CPU; parameters below float64."""
    if importlib.util.find_spec("triton") is None:
        return Availability(False, "Triton is not installed: pip install 'fishleg_fast[triton]'")
    if dtype not in _DTYPES:
        return Availability(
            False, f"its kernels have λ in float32, and {dtype} parameters need float64: use backend='reference'"
        )
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return Availability(True, "interpreted, for tests")
        return Availability(
            False, "there is no CUDA device: move the model to one (TRITON_INTERPRET=1 interprets, for tests)"
        )
    if device.type != "cuda" or torch.version.cuda is None:
        return Availability(False, f"it runs on CUDA devices, not on {device}: use backend='reference'")
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return Availability(
            False, f"it needs compute capability 8.0 or higher, not {major}.{minor}: use backend='reference'"
        )
    return Availability(True, torch.cuda.get_device_name(device))
