"""The main job and its sister run from the command line, on scikit-learn's digits, for a few steps."""

import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.common.paths import ROOT

for needed in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(needed)


def command(script: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.train.{script}", "--threads", "1", "--device", "cpu", *flags]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def call(script: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(script, *flags), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )


def test_autoencoder_ends_in_a_table_and_a_plot(tmp_path):
    done = call("train_autoencoder", "--dataset", "digits", "--steps", "4", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("|")]
    cells = {row[0].strip(): [cell.strip() for cell in row] for row in rows}
    assert cells["optimizer"][:4] == ["optimizer", "lr", "steps", "seconds"]
    assert cells["optimizer"][5:] == ["train NLL", "train MSE", "test NLL", "test MSE"]
    assert (cells["AdamW"][2], cells["FishLeg"][2]) == ("12", "4")
    assert all(float(figure) > 0 for name in ("AdamW", "FishLeg") for figure in cells[name][5:])
    assert (tmp_path / "autoencoder_digits.png").read_bytes().startswith(b"\x89PNG")
    assert "%|" in done.stderr  # the progress bar


def test_resnet_on_the_digits(tmp_path):
    done = call("train_resnet", "--steps", "2", "--width", "4", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "train accuracy" in done.stdout and "FishLeg" in done.stdout
    assert (tmp_path / "resnet18_digits.png").exists()


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("train_autoencoder", ["--dataset", "mnist"], "needs --data DIR"),
        ("train_autoencoder", ["--dataset", "mnist", "--data", "nowhere"], "nowhere is not a folder"),
        ("train_autoencoder", ["--lr-fishleg", "nan"], "should be a number above 0 but is: nan"),
        ("train_autoencoder", ["--steps", "0"], "should be 1 or more but is: 0"),
        ("train_resnet", ["--data", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_wrong_flags_end_in_one_line(script, flags, message):
    done = call(script, *flags)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_leaves_a_table_and_a_plot(tmp_path):
    flags = ["--dataset", "digits", "--steps", "1000000", "--out", str(tmp_path)]
    # A shell may start its background jobs with SIGINT ignored, and children inherit that.
    restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        command("train_autoencoder", *flags),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=restore,
    )
    try:
        assert process.stderr is not None
        shown = ""
        deadline = time.monotonic() + 60
        while "nll=" not in shown and time.monotonic() < deadline:  # training has begun
            shown += process.stderr.read(20)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "AdamW (interrupted)" in out
    assert (tmp_path / "autoencoder_digits.png").exists()
