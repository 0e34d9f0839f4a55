"""Times on a device by CUDA events, and on a CPU, for a rehearsal, by the host's clock; launches; CUDA graphs."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.gpu.results_file import describe

Times = dict[str, Any]
FEWEST, MOST = 5, 60  # samples of a measurement
STRETCH = 1e-3  # seconds that a sample of several calls in a row should take at least


def rounded(x: float) -> float:
    """Five significant digits."""
    return float(f"{x:.5g}")


def spread(ms: Sequence[float]) -> Times:
    """Median, quartiles and least of some times in ms."""
    low, _, high = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else (ms[0],) * 3
    found = {"median": statistics.median(ms), "low": low, "high": high, "least": min(ms)}
    return {name: rounded(x) for name, x in found.items()} | {"samples": len(ms)}


class Clock:
    """Measures functions on one device, each for about so many seconds."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.cuda = device.type == "cuda"
        self._flushed_buffer: torch.Tensor | None = None

    def mark(self) -> Any:
        """A point in the device's (or the CPU's) time; see ``between``."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, a: Any, b: Any) -> float:
        """ms from mark to mark; on a device only after ``wait``."""
        return a.elapsed_time(b) if self.cuda else 1000 * (b - a)

    def wait(self) -> None:
        """Until the device has done its work. Errors of earlier kernels come up here."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def flush(self) -> None:
        """Write twice as much as the L2 cache holds, so that what is measured next reads from memory."""
        if self._flushed_buffer is None:
            size = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0) or 64 << 20
            self._flushed_buffer = torch.empty(max(2 * size, 128 << 20) // 4, dtype=torch.int32, device=self.device)
        self._flushed_buffer.zero_()

    def _duration(self, fn: Callable[[], Any]) -> float:
        """Seconds of a call, roughly; after the first ones, in which kernels are compiled."""
        for _ in range(3):
            fn()
        self.wait()
        start = time.perf_counter()
        fn()
        self.wait()
        return max(time.perf_counter() - start, 1e-6)

    def calls(self, fn: Callable[[], Any]) -> Times:
        """ms of a call among calls back to back, as an eager program makes them: the host's time where it is longer.

        The L2 cache keeps what it holds from the call before.
        """
        each = self._duration(fn)
        row = max(1, min(100, int(STRETCH / each))) if self.cuda else 1
        count = int(max(FEWEST, min(MOST, self.seconds / (row * each))))
        marks = [self.mark()]
        for _ in range(count):
            for _ in range(row):
                fn()
            marks.append(self.mark())
        self.wait()
        return spread([self.between(a, b) / row for a, b in itertools.pairwise(marks)])

    def device_alone(self, fn: Callable[[], Any]) -> Times:
        """ms that the device takes for a call: replays of a CUDA graph, the L2 cache flushed before each.

        The flush keeps the device busy until the graph is queued, so that no time of the host's is in it.
        """
        graph = self.capture(fn)
        return self.flushed(graph.replay) | {"how": "graph"}

    def flushed(self, fn: Callable[[], Any]) -> Times:
        """ms of single calls with the L2 cache flushed before each."""
        each = self._duration(fn)
        pairs = []
        for _ in range(int(max(FEWEST, min(MOST, self.seconds / (each + 2e-4))))):
            self.flush()
            start = self.mark()
            fn()
            pairs.append((start, self.mark()))
        self.wait()
        return spread([self.between(a, b) for a, b in pairs])

    def capture(self, fn: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        """A CUDA graph of one call. Raises where something in it cannot be captured, a synchronisation say."""
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            for _ in range(3):
                fn()
        torch.cuda.current_stream(self.device).wait_stream(aside)
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fn()
        graph.replay()
        self.wait()
        return graph

    def both(self, fn: Callable[[], Any], capturable: Callable[[], Any] | None) -> Times:
        """{"call": as an eager program calls it, "device": the device alone}.

        ``capturable``: the same without synchronisation, for the graph. Where it cannot be captured, or is None, single
        calls of ``fn`` stand in for the graph; "capture error" says why.
        """
        result: Times = {"call": self.calls(fn)}
        if not self.cuda:
            return result
        try:
            if capturable is not None:
                return result | {"device": self.device_alone(capturable)}
        except Exception as error:
            result["capture error"] = describe(error)
            self.wait()  # a device that is lost cannot go on
        return result | {"device": self.flushed(fn) | {"how": "calls"}}

    def launches(self, fn: Callable[[], Any]) -> Times:
        """{"kernels": how many one call runs, "copies": memcpy and memset besides}, or {"launches error"}.

        By torch's profiler. On a CPU there is nothing to count.
        """
        if not self.cuda:
            return {}
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        try:
            fn()
            self.wait()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                fn()
                self.wait()
            names = [
                e.name
                for e in profiler.events() or []
                if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)
            ]
        except Exception as error:
            return {"launches error": describe(error)}
        names = [n for n in names if not n.startswith(("Optimizer.", "ProfilerStep"))]
        copies = sum(n.startswith(("Memcpy", "Memset")) for n in names)
        if not names:
            return {"launches error": "the profiler saw no kernel"}
        return {"kernels": len(names) - copies, "copies": copies}

    def clear(self) -> None:
        """Give memory back where a third of the device's is held: optimizers are cycles of references."""
        if self.cuda and torch.cuda.memory_reserved() > torch.cuda.get_device_properties(self.device).total_memory / 3:
            gc.collect()
            torch.cuda.empty_cache()

    def healthy(self) -> bool:
        """Whether the device still computes; after an illegal access it does not in this process."""
        try:
            self.wait()
            return float(torch.ones(8, device=self.device).sum()) == 8
        except Exception:
            return False
