"""The current stream, and what a CUDA graph that is being captured there keeps."""

from __future__ import annotations

import torch

_captured: dict[tuple[int, ...], object] = {}


def capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def keep(*used: object) -> None:
    """Keep for good what a CUDA graph that is being captured will read and write."""
    if capturing():
        _captured[tuple(map(id, used))] = used


def stream_of(device: torch.device) -> int:
    """The current stream."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
