"""The command for a GPU: its processes, for building, testing and measuring, end well or are followed by others."""

import json
import os
import sys
import time

import pytest

from benchmarks.gpu import build
from benchmarks.gpu.results_file import ResultsFile
from benchmarks.gpu.supervisor import supervise

WORKER = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu.results_file import ResultsFile, Task, work
def dies(): os.kill(os.getpid(), 9)
def hangs(): time.sleep(100)
tasks = [Task("a", dict), Task("b", dies), Task("c", dict), Task("d", hangs), Task("e", dict)]
sys.exit(work(ResultsFile(Path(sys.argv[1])), tasks, 1e12, lambda: True, lambda: None))
"""


def test_a_worker_that_dies_or_hangs_is_followed_by_another(tmp_path):
    path = tmp_path / "gpu.json"
    ResultsFile(path).save()
    command = [sys.executable, "-c", WORKER, str(path)]
    troubles = supervise(command, path, time.time() + 60, dict(os.environ), hangs=1.0)
    results = json.loads(path.read_text())["results"]
    assert list(results) == ["a", "b", "c", "d", "e"]
    assert results["b"]["error"] == "the process died: SIGKILL" and "hung" in results["d"]["error"]
    assert len(troubles) == 2 and not any("error" in results[k] for k in "ace")


def test_a_worker_ends_with_its_supervisor(tmp_path, monkeypatch):
    path, pid = tmp_path / "gpu.json", tmp_path / "pid"
    ResultsFile(path).save()
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
        supervise([sys.executable, "-c", script], path, time.time() + 60, dict(os.environ), 50)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_worker_that_cannot_start_is_not_started_again(tmp_path):
    path = tmp_path / "gpu.json"
    ResultsFile(path).save()
    troubles = supervise([sys.executable, "-c", "raise SystemExit(3)"], path, time.time() + 60, dict(os.environ), 9)
    assert troubles == ["the process died: exit status 3, before it measured anything"]


def test_missing_tools_and_a_missing_pytest_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_module", lambda name: False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    record = build.build(tmp_path, 5)
    assert not record["built"] and "pybind11" in record["why"] and "nvcc" not in record["why"]
    tests = build.test(tmp_path, 5)
    assert "pytest is missing" in tests["verdict"] and not tests["failed"]


@pytest.mark.parametrize(
    ("body", "verdict", "failed"),
    [("pass", "passed", False), ("assert 0", "FAILED", True), ("import time; time.sleep(60)", "cut off", False)],
)
def test_the_kernels_tests_are_run_and_judged(tmp_path, monkeypatch, body, verdict, failed):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(f"import pytest\n@pytest.mark.gpu\ndef test_it():\n    {body}\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "_module", lambda name: name == "pytest")
    record = build.test(tmp_path, 0.7 if verdict == "cut off" else 60)
    assert record["verdict"].startswith(verdict) and record["failed"] == failed
    assert (record["failures"] != []) == failed
