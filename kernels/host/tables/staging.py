"""Copies from the host to the device, by pinned memory that each stream uses again once its copies are over."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

import torch
from torch import Tensor

from . import streams

RING = 8  # copies under way: so many steps the host may be ahead before it waits
LARGEST = 1 << 20  # bytes of pinned memory that is kept for later copies
observers: list[Callable[[int], object]] = []  # called with the bytes of every copy: how tests count them


def pinned(size: int) -> Tensor:
    """So many bytes."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True, device="cpu")


class Ring:
    """Pinned memory of one stream: a few pieces in turn, each written to again when its copy is over."""

    def __init__(self) -> None:
        self._pieces: list[tuple[Tensor, torch.cuda.Event]] = []
        self._next = 0
        self._lock = Lock()  # threads may step optimizers of their own

    def copy(self, source: Tensor, target: Tensor) -> None:
        """``source``: bytes, which may be written to as soon as this returns; ``target``: bytes on the device."""
        size = source.numel()
        with self._lock:
            piece, event = self._piece(size)
            piece[:size].copy_(source)
            target.copy_(piece[:size], non_blocking=True)
            event.record()

    def _piece(self, size: int) -> tuple[Tensor, torch.cuda.Event]:
        """The one whose turn it is, as large as that."""
        if len(self._pieces) < RING:
            self._pieces.append((pinned(_rounded(size)), torch.cuda.Event()))
            return self._pieces[-1]
        at, self._next = self._next, (self._next + 1) % RING
        piece, event = self._pieces[at]
        if not event.query():
            event.synchronize()
        if piece.numel() < size:
            self._pieces[at] = pinned(_rounded(size)), event
        return self._pieces[at]


def _rounded(size: int) -> int:
    return 1 << max(size - 1, 4095).bit_length()


_rings: dict[tuple[torch.device, int], Ring] = {}


def send(source: bytes | Tensor, target: Tensor) -> None:
    """Copy to contiguous memory on a device, in the order of its current stream.

    While a CUDA graph is captured the source is kept, since the graph copies it at every replay.
    """
    given = torch.frombuffer(bytearray(source), dtype=torch.uint8) if isinstance(source, bytes) else _bytes_of(source)
    target = _bytes_of(target)
    for observer in observers:
        observer(given.numel())
    if not asynchronous(target.device):
        target.copy_(given)
    elif streams.capturing() or given.numel() > LARGEST:
        piece = pinned(given.numel()).copy_(given)
        target.copy_(piece, non_blocking=True)  # torch keeps pinned memory until its copies are over
        streams.keep(piece)
    else:
        key = target.device, streams.stream_of(target.device)
        _rings.setdefault(key, Ring()).copy(given, target)


def asynchronous(device: torch.device) -> bool:
    """Whether copies to the device go on while the host does."""
    return device.type == "cuda"


def _bytes_of(t: Tensor) -> Tensor:
    return t.reshape(-1).view(torch.uint8)
