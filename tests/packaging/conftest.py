"""What setuptools would put into a wheel and an sdist, without compiling or writing into the checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def _distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("distribution")
    removed = folder / "lib" / "fishleg_fast" / "removed.py"  # as an earlier build left a module that is gone since
    removed.parent.mkdir(parents=True)
    removed.touch()
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder, "build_py", "--build-lib", folder / "lib"],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def wheel(_distribution: Path) -> Path:
    """A folder with the Python part of a wheel."""
    return _distribution / "lib"


@pytest.fixture(scope="session")
def sdist(_distribution: Path) -> set[str]:
    """Paths of what is in an sdist, from the checkout's root."""
    return set((_distribution / "fishleg_fast.egg-info" / "SOURCES.txt").read_text(encoding="utf-8").splitlines())
