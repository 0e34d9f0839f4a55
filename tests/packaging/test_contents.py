"""What is in a wheel and in an sdist, by setuptools' own lists."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fishleg_fast import __version__

ROOT = Path(__file__).resolve().parents[2]
NOT_IN_SDIST = {".ci/run", ".gitignore", "fishleg_fast/kernels"}  # the last is a link


def _files(folder: Path, pattern: str = "*") -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob(pattern) if path.is_file()}


def test_a_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    package = {name for name in _files(ROOT / "fishleg_fast", "*.py") if not name.startswith("kernels/")}
    kernels = {f"kernels/{name}" for name in _files(ROOT / "kernels", "*.py")}
    assert kernels
    assert _files(wheel) == {f"fishleg_fast/{name}" for name in package | kernels | {"py.typed"}}


def test_an_sdist_has_what_the_build_reads(sdist: set[str]) -> None:
    wanted = {"CMakeLists.txt", "LICENSE", "README.md", "fishleg_fast/py.typed", "pyproject.toml", "setup.py"}
    for folder, pattern in (("csrc", "*"), ("kernels", "*.py")):
        found = _files(ROOT / folder, pattern)
        assert found
        wanted |= {f"{folder}/{name}" for name in found}
    assert wanted - sdist == set()


def test_an_sdist_has_all_that_git_has(sdist: set[str]) -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    there = {name for name in tracked.splitlines() if (ROOT / name).exists()}
    assert there - sdist - NOT_IN_SDIST == set(), "MANIFEST.in should name them"


def test_an_sdist_has_nothing_built(sdist: set[str]) -> None:
    assert [name for name in sdist if re.search(r"\.(so|pyd|pyc|o|whl)$|__pycache__", name)] == []


def test_the_citation_is_of_this_version() -> None:
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited is not None and cited[1] == __version__
