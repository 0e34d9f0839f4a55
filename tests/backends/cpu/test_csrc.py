"""The C++ tests of csrc/, through CTest, in a build with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fishleg_fast import native
from fishleg_fast.backends import registry

ROOT = Path(__file__).resolve().parents[3]


def tool(name: str) -> str:
    """cmake, ctest or ninja: that of this Python environment, or the PATH's. Skips where there is none."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers' flags are those of GCC and Clang on Linux")
def test_ctest_with_sanitizers(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    options = ["-DFISHLEG_FAST_TESTS=ON", "-DFISHLEG_FAST_SANITIZE=ON", "-DFISHLEG_FAST_CUDA=OFF"]
    ninja = f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"
    run(tool("cmake"), "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", ninja, *options, cwd=tmp_path)
    run(tool("cmake"), "--build", str(tmp_path), cwd=tmp_path)
    said = run(tool("ctest"), "--output-on-failure", "--no-tests=error", cwd=tmp_path)
    assert "100% tests passed" in said


def test_an_extension_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("fishleg_fast._native")
    monkeypatch.setattr(module, "__version__", "0.0.1")
    ok, reason = native.available()
    assert not ok and "built for fishleg_fast 0.0.1" in reason and "make clean setup" in reason
    assert registry.available("cpp") == (False, reason)
    with pytest.raises(ImportError, match=r"built for fishleg_fast 0\.0\.1"):
        native.extension()
