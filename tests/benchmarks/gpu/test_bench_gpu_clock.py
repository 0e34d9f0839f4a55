"""The command for a GPU: its clock, with a device that is made up."""

from contextlib import nullcontext

import pytest
import torch

from benchmarks.gpu.clock import Clock, spread
from benchmarks.gpu.report.text import cell

CPU = torch.device("cpu")


class Event:
    """Time passes by one ms with every call of the function measured."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def elapsed_time(self, other):
        return other.at - self.at


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        assert isinstance(other, Stream)


class Graph:
    def replay(self):
        Event.now += 0.25


@pytest.fixture
def clock(monkeypatch):
    """A Clock of a device whose calls take 1 ms and whose graphs take 0.25 ms; `clock.flushes` counts."""
    made = Clock(CPU, 0.01)
    made.cuda, made.flushes = True, 0
    properties = type("Properties", (), {"L2_cache_size": 1 << 10, "total_memory": 1 << 30})

    class Trash:
        def zero_(self):
            made.flushes += 1

    for name, value in {
        "Event": Event, "Stream": Stream, "CUDAGraph": Graph, "current_stream": Stream, "stream": nullcontext,
        "graph": nullcontext, "synchronize": lambda device=None: None,
        "get_device_properties": lambda device: properties,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "empty", lambda *size, **options: Trash())
    return made


def one_call():
    Event.now += 1


def test_eager_calls_and_graphs_are_timed_apart(clock):
    times = clock.both(one_call, one_call)
    assert times["call"]["median"] == 1 and clock.flushes == times["device"]["samples"] >= 5
    assert times["device"]["median"] == 0.25 and times["device"]["how"] == "graph"


def test_what_cannot_be_captured_is_timed_by_single_calls_and_says_why(clock):
    def synchronises():
        raise RuntimeError("operation not permitted when stream is capturing")

    times = clock.both(one_call, synchronises)
    assert "not permitted" in times["capture error"]
    assert times["device"]["median"] == 1 and times["device"]["how"] == "calls"
    assert cell(times, "device") == "1 (1 to 1)*"
    times = clock.both(one_call, None)
    assert times["device"]["how"] == "calls" and "capture error" not in times


def test_spread_is_median_and_quartiles():
    assert spread([1, 2, 3, 4, 100]) == {"median": 3, "low": 2, "high": 4, "least": 1, "samples": 5}
    assert spread([0.0123456789])["high"] == 0.012346
