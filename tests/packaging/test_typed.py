"""The package's types, as an installed package shows them to its user's mypy."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TYPED = Path(__file__).with_name("typed")


@pytest.mark.slow  # until mypy has kept what it learned of torch
def test_mypy_strict_passes_right_uses_and_reports_wrong_ones(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed")
    # Installed as by a wheel: on a path of sources mypy does without py.typed, and an editable package it cannot find.
    environment = tmp_path / "environment"
    venv.create(environment)
    (python,) = environment.glob("bin/python")
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "installed.pth").write_text(f"{wheel}\n{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    done = subprocess.run(
        [
            sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-error-summary", "--no-pretty",
            "--python-executable", python, "--cache-dir", ROOT / ".mypy_cache" / "consumer", "consumer.py", "wrong.py",
        ],
        cwd=TYPED, capture_output=True, text=True,
    )  # fmt: skip
    errors = re.finditer(r"^(\S+?):(\d+): error: .*\[(.+)\]$", done.stdout, re.MULTILINE)
    reported = {(error[1], int(error[2]), error[3]) for error in errors}
    lines = (TYPED / "wrong.py").read_text(encoding="utf-8").splitlines()
    marked = [(n, line.split("# wrong: ")[1]) for n, line in enumerate(lines, 1) if "# wrong: " in line]
    wrong = {("wrong.py", n, code) for n, codes in marked for code in codes.split()}
    assert wrong
    assert reported == wrong, done.stdout + done.stderr
