"""The one place where kernels are launched, and what they are launched on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl

# What the kernels read and write, and are compiled for.
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
observers: list[Callable[[str], object]] = []  # called with the kernel's name at every launch: how tests count them


@cache
def capability(device: torch.device) -> int:
    """80, 90, 100, ... In the interpreter, 80."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors. In the interpreter, 2: enough to run a persistent loop."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


class Launch(NamedTuple):
    """A launch that is prepared once and made at every step."""

    kernel: Any
    tiles: int
    args: tuple
    constants: dict[str, Any]  # and ``device``, ``num_warps``, ...

    def __call__(self, *more: Any) -> None:
        """``more``: arguments after those that are prepared."""
        launch(self.kernel, self.tiles, *self.args, *more, **self.constants)


def launch(
    kernel: Any,
    tiles: int,  # of the schedule
    *args: Any,
    device: torch.device,
    per_processor: int = 1,  # programs
    num_warps: int = 4,
    num_stages: int = 1,
    **constants: Any,
) -> None:
    """Run a persistent kernel over ``tiles`` tiles; nothing where there are none.

    enable_fp_fusion is set since its default changes between versions of Triton, and rounding with it.
    """
    if not tiles:
        return
    for observer in observers:
        observer(kernel.__name__ if hasattr(kernel, "__name__") else str(kernel))
    grid = (min(tiles, per_processor * processors(device)),)
    elsewhere = device.type == "cuda" and device.index not in (None, torch.cuda.current_device())
    with torch.cuda.device(device) if elsewhere else nullcontext():  # Triton launches on the current device
        kernel[grid](*args, tiles, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True, **constants)
