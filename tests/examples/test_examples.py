"""The examples run as a reader runs them, and end where they say."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MISSING = "make setup-examples installs {}"


def run(*command: str) -> str:
    """What an example prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def needs(*modules: str) -> pytest.MarkDecorator:
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(absent), reason=MISSING.format(", ".join(absent)))


def test_plain_loop() -> None:
    losses = re.findall(r"loss (\d+\.\d+)", run("-m", "examples.plain_loop", "--steps", "80"))
    adamw, fishleg = map(float, losses)
    assert fishleg < adamw < 4


@pytest.mark.parametrize("way", [(), ("--shard",)], ids=["ddp", "fully_shard"])
def test_several_processes(way: tuple[str, ...]) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    losses = re.findall(r"loss (\d+\.\d+)", run(*launch, "-m", "examples.several_processes", "--steps", "20", *way))
    assert float(losses[0]) > 4.5 and float(losses[-1]) < 3


@needs("transformers", "accelerate")
def test_huggingface_trainer() -> None:
    said = run("-m", "examples.huggingface_trainer", "--steps", "20")
    first, *_, last = map(float, re.findall(r"\d+\.\d+", next(x for x in said.splitlines() if x.startswith("loss:"))))
    assert last < first - 0.5
    assert "bit for bit: True" in said


@needs("lightning", "sklearn")
def test_lightning_module() -> None:
    said = run("-m", "examples.lightning_module", "--steps", "36")
    first, last = map(float, re.findall(r"\d+\.\d+", next(x for x in said.splitlines() if x.startswith("loss:"))))
    assert first > 2 and last < 0.3
    assert "bit for bit: True" in said
