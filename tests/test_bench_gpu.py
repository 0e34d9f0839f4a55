"""The command for a GPU: a rehearsal on the CPU end to end, and that its bookkeeping is right.

Nothing here is about how long anything takes.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = str(ROOT / "benchmarks")
sys.path.insert(0, BENCHMARKS)  # they import each other by short names, as scripts do
try:
    import gpu
    import gpu_build
    import gpu_models
    import gpu_report
    from gpu_document import SICK, Document, Task, describe, work
    from gpu_measure import Clock, spread
finally:
    sys.path.remove(BENCHMARKS)

CPU = torch.device("cpu")


# ---- the rehearsal


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """OUT of a rehearsal, and its process."""
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--dry-run", "--budget", "200", "--out", str(out)]
    command += ["--backends", "reference"]  # the kernels' interpreters are slow, and have tests of their own
    done = subprocess.run(command, capture_output=True, text=True, cwd=out, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return out, done


def test_a_rehearsal_measures_everything_and_says_what_it_is(rehearsal):
    out, done = rehearsal
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(p.name for p in out.iterdir()) == ["gpu.json", "gpu.txt"]
    data = json.loads((out / "gpu.json").read_text())
    assert data["rehearsal"] and data["unmeasured"] == [] and data["running"] is None
    assert [key for key, r in data["results"].items() if "error" in r] == []
    kinds = {key.split("/")[0] for key in data["results"]}
    assert kinds == {"check", "peak", "qv", "refresh", "theta_step", "lambda_step", "theta", "train"}
    for by in ("reference", "compiled", "compiled-graphs"):
        assert f"qv/4/{by}/highest" in data["results"]
    assert {key.split("/")[2] for key in data["results"] if key.startswith("theta/mnist/")} >= {
        "adamw", "published", "reference"
    }  # fmt: skip
    assert {key.split("/")[1] for key in data["results"] if key.startswith("train/")} == set(gpu_models.CASES)
    times = data["results"]["lambda_step/4/reference/highest"]["call"]
    assert 0 < times["least"] <= times["low"] <= times["median"] <= times["high"] and times["samples"] >= 5
    for key in ("commit", "date", "command", "seconds", "targets"):
        assert data[key]
    assert {"device", "python", "torch", "triton", "backends"} <= set(data["environment"])
    assert str(out) not in (out / "gpu.json").read_text()


def test_the_tables_follow_from_the_json_alone(rehearsal):
    out, _ = rehearsal
    text = (out / "gpu.txt").read_text()
    assert gpu_report.render(json.loads((out / "gpu.json").read_text())) == text
    assert "REHEARSAL" in text.splitlines()[2]
    for title in ("Targets", "Correctness", "θ step of whole models", "Training steps", *gpu_report.OPS.values()):
        assert f"## {title}" in text
    assert not re.search(r"\| +(yes|NO) \|$", text.split("## Correctness")[0], re.M)  # a rehearsal meets no target
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--render", str(out / "gpu.json")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == text + "\n"


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "x")]) == 2
    assert "no CUDA device" in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is missing")
def test_the_make_target_takes_the_interpreter_as_it_is():
    def says(*variables):
        command = ["make", "-n", "bench-gpu", "PYTHON=python3", *variables]
        outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
        done = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert says("OUT=x") == ["python3", "benchmarks/gpu.py", "--out", "x"]
    assert says("OUT=x", "ARGS=--only qv")[-2:] == ["--only", "qv"]


# ---- bookkeeping


def fill(path, tasks, deadline=1e12, healthy=lambda: True):
    """What a worker does; (exit status, the file's data)."""
    status = work(Document(path, gpu_report.render), tasks, deadline, healthy, lambda: None)
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
    assert status == SICK and list(data["results"]) == ["a"]
    status, data = fill(tmp_path / "lost.json", tasks)
    assert status == 0 and list(data["results"]) == ["a", "b"]


WORKER = f"""
import os, sys, time
sys.path.insert(0, {BENCHMARKS!r})
from pathlib import Path
from gpu_document import Document, Task, describe, work
def dies(): os.kill(os.getpid(), 9)
def hangs(): time.sleep(100)
tasks = [Task("a", dict), Task("b", dies), Task("c", dict), Task("d", hangs), Task("e", dict)]
sys.exit(work(Document(Path(sys.argv[1])), tasks, 1e12, lambda: True, lambda: None))
"""


def test_a_worker_that_dies_or_hangs_is_followed_by_another(tmp_path):
    path = tmp_path / "gpu.json"
    Document(path).save()
    command = [sys.executable, "-c", WORKER, str(path)]
    troubles = gpu.supervise(command, path, time.time() + 60, dict(os.environ), hangs=1.0)
    results = json.loads(path.read_text())["results"]
    assert list(results) == ["a", "b", "c", "d", "e"]
    assert results["b"]["error"] == "the process died: SIGKILL" and "hung" in results["d"]["error"]
    assert len(troubles) == 2 and not any("error" in results[k] for k in "ace")


def test_a_worker_ends_with_its_supervisor(tmp_path, monkeypatch):
    path, pid = tmp_path / "gpu.json", tmp_path / "pid"
    Document(path).save()
    script = f"import os, time, pathlib; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(100)"
    calls = []

    def interrupted(seconds):
        calls.append(seconds)
        if pid.exists() and pid.read_text():
            raise KeyboardInterrupt
        real(seconds)

    real = time.sleep
    monkeypatch.setattr(time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu.supervise([sys.executable, "-c", script], path, time.time() + 60, dict(os.environ), 50)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_worker_that_cannot_start_is_not_started_again(tmp_path):
    path = tmp_path / "gpu.json"
    Document(path).save()
    troubles = gpu.supervise([sys.executable, "-c", "raise SystemExit(3)"], path, time.time() + 60, dict(os.environ), 9)
    assert troubles == ["the process died: exit status 3, before it measured anything"]


def test_missing_tools_and_a_missing_pytest_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_build, "_module", lambda name: False)
    monkeypatch.setattr(gpu_build.shutil, "which", lambda name: None)
    record = gpu_build.build(tmp_path, 5)
    assert not record["built"] and "pybind11" in record["why"] and "nvcc" not in record["why"]
    tests = gpu_build.test(tmp_path, 5)
    assert "pytest is missing" in tests["verdict"] and not tests["failed"]


@pytest.mark.parametrize(
    ("body", "verdict", "failed"),
    [("pass", "passed", False), ("assert 0", "FAILED", True), ("import time; time.sleep(60)", "cut off", False)],
)
def test_the_kernels_tests_are_run_and_judged(tmp_path, monkeypatch, body, verdict, failed):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(f"import pytest\n@pytest.mark.gpu\ndef test_it():\n    {body}\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    monkeypatch.setattr(gpu_build, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_build, "_module", lambda name: name == "pytest")
    record = gpu_build.test(tmp_path, 0.7 if verdict == "cut off" else 60)
    assert record["verdict"].startswith(verdict) and record["failed"] == failed
    assert (record["failures"] != []) == failed


# ---- the clock, with a device that is made up


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
    assert gpu_report.cell(times, "device") == "1 (1 to 1)*"
    times = clock.both(one_call, None)
    assert times["device"]["how"] == "calls" and "capture error" not in times


def test_an_error_tells_what_it_came_out_of():
    try:
        try:
            raise ValueError("first")
        finally:
            raise RuntimeError("second" * 200)
    except RuntimeError as error:
        text = describe(error)
    assert text.endswith("(after ValueError: first)") and len(text) < 700


def test_spread_is_median_and_quartiles():
    assert spread([1, 2, 3, 4, 100]) == {"median": 3, "low": 2, "high": 4, "least": 1, "samples": 5}
    assert spread([0.0123456789])["high"] == 0.012346


# ---- targets


def test_targets_are_judged_at_the_worst_size_and_only_where_measured():
    one = lambda x: {"call": spread([x])}
    results = {
        "theta/mnist/adamw/highest": one(1.0), "theta/mnist/triton/high": one(2.5),
        "theta/mnist/published/high": one(40.0), "theta/mnist/published/highest": one(60.0),
        "qv/256/triton/high": one(1.0), "qv/256/compiled/high": one(9.0), "qv/256/compiled-graphs/high": one(3.0),
        "qv/512/triton/high": one(1.0), "qv/512/compiled/high": one(2.5),
        "qv/1024/triton/high": one(1.0), "qv/1024/compiled/high": one(0.9),
        "refresh/2048/triton/high": one(9.0), "refresh/2048/mm/high": one(1.0),
        "refresh/4096/triton/high": one(1.0), "refresh/4096/mm/high": one(1.6),
        "refresh/8192/triton/high": {"error": "out of memory"}, "refresh/8192/mm/high": one(10.0),
    }  # fmt: skip
    backends = {n: {"available": True, "why": ""} for n in ("triton", "reference")}
    data = {"results": results, "environment": {"backends": backends}}
    found = [t for t in gpu_report.targets(data) if t["timing"] == "call" and t["precision"] == "high"]
    assert {t["backend"] for t in found} == {"triton"}
    values = [(t["value"], t["at"], t["measured"], t["met"]) for t in found]
    assert values == [
        (2.5, "mnist", "1 of 1", True),
        (16.0, "mnist", "1 of 1", False),
        (24.0, "mnist", "1 of 1", True),  # in float32
        (2.5, "512", "2 of 2", True),  # the faster compiled one counts: 3 at 256
        (0.9, "1024", "3 of 3", False),
        (1.6, "4096", "1 of 2", None),  # good so far, but one size is missing
    ]
    assert all(t["met"] is None for t in gpu_report.targets(data) if t["timing"] == "device")
    text = gpu_report.render(data)
    assert re.search(r"0\.9 at 1024 .* NO \|", text) and "REHEARSAL" not in text


def test_failed_is_a_wrong_check_a_failed_test_or_no_check():
    check = lambda right: {"results": {"check/kron/a/high": {"right": right}}, "tests": {"failed": False}}
    assert not gpu_report.failed(check(True)) and gpu_report.failed(check(False))
    assert gpu_report.failed({"results": {"check/kron/a/high": {"error": "it raised"}}})
    assert gpu_report.failed({"results": {}}) and not gpu_report.failed({"results": {}, "only": ["qv"]})
    assert gpu_report.failed(check(True) | {"tests": {"failed": True}})
