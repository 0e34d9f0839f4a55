"""The command for a GPU: a rehearsal on the CPU end to end.

Nothing here is about how long anything takes.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from benchmarks.common.paths import ROOT
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.measurements import models
from benchmarks.gpu.report.text import OPS, render


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """OUT of a rehearsal, and its process."""
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--budget", "200", "--out", str(out)]
    command += ["--backends", "reference"]  # the kernels' interpreters are slow, and have tests of their own
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
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
    assert {key.split("/")[1] for key in data["results"] if key.startswith("train/")} == set(models.CASES)
    times = data["results"]["lambda_step/4/reference/highest"]["call"]
    assert 0 < times["least"] <= times["low"] <= times["median"] <= times["high"] and times["samples"] >= 5
    for key in ("commit", "date", "command", "seconds", "targets"):
        assert data[key]
    assert {"device", "python", "torch", "triton", "backends"} <= set(data["environment"])
    assert str(out) not in (out / "gpu.json").read_text()


def test_the_tables_follow_from_the_json_alone(rehearsal):
    out, _ = rehearsal
    text = (out / "gpu.txt").read_text()
    assert render(json.loads((out / "gpu.json").read_text())) == text
    assert "REHEARSAL" in text.splitlines()[2]
    for title in ("Targets", "Correctness", "θ step of whole models", "Training steps", *OPS.values()):
        assert f"## {title}" in text
    assert not re.search(r"\| +(yes|NO) \|$", text.split("## Correctness")[0], re.M)  # a rehearsal meets no target
    command = [sys.executable, "-m", "benchmarks.gpu", "--render", str(out / "gpu.json")]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == text + "\n"


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--out", str(tmp_path / "x")]) == 2
    assert "no CUDA device" in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is missing")
def test_the_make_target_takes_the_interpreter_as_it_is():
    def says(*variables):
        command = ["make", "-n", "bench-gpu", "PYTHON=python3", *variables]
        outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
        done = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert says("OUT=x") == ["python3", "-m", "benchmarks.gpu", "--out", "x"]
    assert says("OUT=x", "ARGS=--only qv")[-2:] == ["--only", "qv"]
