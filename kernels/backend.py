"""``backend="triton"``: the ops of ``reference.steps``, for whole lists of blocks in a handful of launches.

Launches for all blocks together, whatever their number (each dtype of parameters and precision apart):

    θ step   Kron, Kron(scale=True), SumKron: 3; 2 with normalize=None and nothing else. DiagKron: 5; among those
             2 more. Diagonal: 1 more
    Q u      Kron, Kron(scale=True), SumKron: 2. DiagKron: 4; among those 2 more. Diagonal: 1
    λ step   Kron, SumKron: 4 (5 without learn_scale), 2 more with precondition. Diagonal: 2 more
    refresh  Kron, Kron(scale=True), SumKron: 1 (P and S). DiagKron: 1 (padded copies of its factors)
    inner    1

The reference's functions do the work, within the same step and its one decision, of: blocks so large that torch.mm is
faster (``configurations.library_product``), but for their P and S; λ of Kron(scale=True) and DiagKron;
diagonal and block-diagonal factors; structures of custom layers; float64; thin gradients in Q u and λ steps; parameters
whose columns two strides do not find.

CUDA graphs: with ``capturable``, after a step or two outside. Host work per block is about 10 µs in a θ step whose
tensors are where they were, and several times that in an update of λ.

Triton is imported by the first op, not by this module: ``available`` answers without it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

_OPS = {  # in files; anchoring is the reference's
    "refresh": "fishleg_fast.kernels.symmetric",
    "qv": "fishleg_fast.kernels.qv",
    "inner": "fishleg_fast.kernels.inner",
    "theta_step": "fishleg_fast.kernels.theta",
    "lambda_step": "fishleg_fast.kernels.learn",
    "anchor": "fishleg_fast.reference",
}
_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


def available(device: torch.device | None = None, dtype: torch.dtype | None = None) -> tuple[bool, str]:
    """A CUDA device of compute capability 8.0, or Triton's interpreter on a CPU; parameters below float64."""
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed: pip install 'fishleg_fast[triton]'"
    if dtype not in _DTYPES:
        return False, f"its kernels have λ in float32, and {dtype} parameters need float64: use backend='reference'"
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return True, "interpreted, for tests"
        return False, "there is no CUDA device: move the model to one (TRITON_INTERPRET=1 interprets, for tests)"
    if device.type != "cuda" or torch.version.cuda is None:
        return False, f"it runs on CUDA devices, not on {device}: use backend='reference'"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return False, f"it needs compute capability 8.0 or higher, not {major}.{minor}: use backend='reference'"
    return True, torch.cuda.get_device_name(device)


def __getattr__(name: str) -> Callable[..., Any]:
    """The ops, each with the reference's signature; Triton comes with the first."""
    if name not in _OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    op = globals()[name] = getattr(importlib.import_module(_OPS[name]), name)
    return op
