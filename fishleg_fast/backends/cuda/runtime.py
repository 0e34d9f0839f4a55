"""Where the CUDA kernels run; tests put kernels compiled for the CPU in their place."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch

from ... import native


class Runtime(NamedTuple):
    """Where the kernels are, the type of the devices they run on, and a device's current stream."""

    extension: ModuleType
    kind: str
    stream: Callable[[torch.device], int]


_runtime: Runtime | None = None


def runtime() -> Runtime:
    """ImportError where the extension is unavailable."""
    global _runtime
    if _runtime is None:
        _runtime = Runtime(native.extension(), "cuda", lambda device: torch.cuda.current_stream(device).cuda_stream)
    return _runtime
