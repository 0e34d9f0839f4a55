"""The command for a GPU: the results are written as they come, and what fails or finds no time is named."""

import json
import time
from functools import partial

import torch

from benchmarks.gpu.clock import spread
from benchmarks.gpu.report.text import render
from benchmarks.gpu.results_file import DEVICE_LOST, ResultsFile, Task, describe, work


def fill(path, tasks, deadline=1e12, healthy=lambda: True):
    """What a worker does; (exit status, the file's data)."""
    status = work(ResultsFile(path, render), tasks, deadline, healthy, lambda: None)
    return status, json.loads(path.read_text())


def test_the_budget_stops_it_and_what_there_is_stays(tmp_path):
    seen = []

    def run(name):
        seen.append(name)
        return {"call": spread([1.0, 2.0])}

    tasks = [
        Task("qv/4/a/high", partial(run, "a"), 1),
        Task("b", partial(run, "b"), 1e6),
        Task("c", partial(run, "c"), 1),
    ]
    status, data = fill(tmp_path / "gpu.json", tasks, deadline=time.time() + 1000)
    assert (status, seen) == (0, ["a", "c"])  # what is too long is left out, a shorter one after it is not
    assert data["unmeasured"] == ["b"] and list(data["results"]) == ["qv/4/a/high", "c"]
    text = (tmp_path / "gpu.txt").read_text()
    assert "no time for\n\n- b\n" in text
    _, data = fill(tmp_path / "gpu.json", tasks, deadline=0)
    assert seen == ["a", "c"] and data["unmeasured"] == ["b"]


def test_the_file_holds_every_result_before_the_next_is_measured(tmp_path):
    path = tmp_path / "gpu.json"

    def second():
        data = json.loads(path.read_text())
        assert data["running"] == "second" and data["results"]["first"]["x"] == 1 and data["unmeasured"] == ["second"]
        return {"x": float("nan")}

    _, data = fill(path, [Task("first", lambda: {"x": 1}), Task("second", second)])
    assert data["results"]["second"]["x"] is None  # the assertions held, and JSON has no nan


def test_a_failing_measurement_is_recorded_and_the_rest_goes_on(tmp_path):
    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB")

    tasks = [Task("qv/64/triton/high", fails), Task("qv/64/cuda/high", lambda: {"call": spread([3.0])})]
    status, data = fill(tmp_path / "gpu.json", tasks)
    assert status == 0 and data["results"]["qv/64/cuda/high"]["call"]["median"] == 3
    assert (
        data["results"]["qv/64/triton/high"]["error"]
        == "OutOfMemoryError: CUDA out of memory. Tried to allocate 99 GiB"
    )
    assert "- qv/64/triton/high: OutOfMemoryError" in (tmp_path / "gpu.txt").read_text()
    # a device that is lost to the process: the next process goes on after it
    tasks = [Task("a", fails), Task("b", lambda: {"x": 1})]
    status, data = fill(tmp_path / "lost.json", tasks, healthy=lambda: False)
    assert status == DEVICE_LOST and list(data["results"]) == ["a"]
    status, data = fill(tmp_path / "lost.json", tasks)
    assert status == 0 and list(data["results"]) == ["a", "b"]


def test_an_error_tells_what_it_came_out_of():
    try:
        try:
            raise ValueError("first")
        finally:
            raise RuntimeError("second" * 200)
    except RuntimeError as error:
        text = describe(error)
    assert text.endswith("(after ValueError: first)") and len(text) < 700
