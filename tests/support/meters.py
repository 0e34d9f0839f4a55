"""What users' training scripts count with, defined beside their models."""

from __future__ import annotations

import queue
import threading


class AverageMeter:
    def __init__(self) -> None:
        self.total, self.count, self.history = 0.0, 0, []

    def update(self, value: float) -> None:
        self.total += value
        self.count += 1
        self.history.append(value)


class Worker:
    """Another thread's: what that puts here is not to be taken away."""

    def __init__(self) -> None:
        self.waiting: queue.Queue[int] = queue.Queue()
        self.lock = threading.Lock()


class Link:
    """One of a long chain."""

    def __init__(self, length: int) -> None:
        self.calls = 0
        self.next = Link(length - 1) if length else None
