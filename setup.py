"""Drives CMake for the compiled extension. Metadata is in pyproject.toml, the build in CMakeLists.txt.

``FISHLEG_FAST_CUDA`` says what to build:

- unset: with CUDA if nvcc is found; if nvcc cannot build it, C++ only, and it says so;
- ``0``: C++ only;
- ``1``: with CUDA, or the installation fails.

The extension is optional, as fishleg_fast runs without it: where even the C++ build fails (no compiler, say),
the Python package still installs. The reason is printed (pip shows it with -v) and kept beside the package,
where ``python -m fishleg_fast`` finds it.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CUDA_CHOICES = {"": "AUTO", "0": "OFF", "1": "ON"}
REASON_FILE = "_native_build.txt"  # read by fishleg_fast/native.py
NVCC_FAILED = "nvcc was there but the build with it failed; FISHLEG_FAST_CUDA=1 pip install . shows why"


class BuildFailed(Exception):
    """CMake could not configure or build; the message says why."""


def say(message: str) -> None:
    print(f"fishleg_fast: {message}", file=sys.stderr, flush=True)


def find_tool(name: str, folder: str) -> str:
    """Path of cmake or ninja: from the pip package of that name (what CI tests) if installed, else PATH."""
    try:
        path = shutil.which(name, path=getattr(importlib.import_module(name), folder))
    except (ImportError, AttributeError):
        path = None
    path = path or shutil.which(name)
    if path is None:
        raise BuildFailed(f"{name} was not found: pip install {name}")
    return path


def run(command: list[str]) -> None:
    """Runs a command and prints its output; where it fails, raises BuildFailed with the first error in it."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    print(done.stdout, file=sys.stderr, flush=True)
    if done.returncode == 0:
        return
    if "No CMAKE_CXX_COMPILER could be found" in done.stdout:
        raise BuildFailed("no C++ compiler was found: install g++ or clang++ (C++20), or set CXX to one")
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    compiler_says = [line for line in lines if re.search(r"\b(error|fatal)\b.*:", line)]
    headlines = [i for i, line in enumerate(lines) if line.startswith("CMake Error")]  # the text is below
    cmake_says = [" ".join(lines[i : i + 4]) for i in headlines]
    raise BuildFailed([*compiler_says, *cmake_says, *lines[-1:], f"exit status {done.returncode}"][0])


def build(
    extension: Path,  # the file to build
    build_dir: Path,
    version: str,
    cuda: str,  # AUTO, ON or OFF
    no_cuda_reason: str = "",  # what the extension says of a missing CUDA, if not CMakeLists.txt's words
) -> None:
    """Configures and builds the extension."""
    try:
        import pybind11
    except ImportError:
        raise BuildFailed("pybind11 was not found: pip install pybind11") from None

    # What changes from one build environment to the next is given anew: a path in CMake's cache may be gone.
    run([
        find_tool("cmake", "CMAKE_BIN_DIR"), "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja', 'BIN_DIR')}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={extension.parent}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DFISHLEG_FAST_VERSION={version}",
        f"-DFISHLEG_FAST_CUDA={cuda}",
        f"-DFISHLEG_FAST_NO_CUDA_REASON={no_cuda_reason}",
    ])  # fmt: skip
    run([find_tool("cmake", "CMAKE_BIN_DIR"), "--build", str(build_dir)])
    if not extension.exists():
        raise BuildFailed(f"CMake built something, but not {extension.name}: remove the folder build/")


def found_nvcc(build_dir: Path) -> bool:
    """Whether the build that has just failed had found nvcc, and so may succeed without it."""
    cache = build_dir / "CMakeCache.txt"
    if not cache.exists():
        return False
    nvcc = re.search(r"^FISHLEG_FAST_NVCC:FILEPATH=(.+)$", cache.read_text(), re.MULTILINE)
    return nvcc is not None and not nvcc[1].endswith("-NOTFOUND")


class FreshBuild(build_py):
    """``build_py`` without what an earlier build in the same folder left: modules since removed or renamed."""

    def run(self) -> None:
        package = Path(self.build_lib, "fishleg_fast").resolve()
        if not self.editable_mode and package.parent != ROOT:  # never the sources themselves
            shutil.rmtree(package, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """``build_ext`` by CMake and Ninja."""

    def build_extension(self, ext: Extension) -> None:
        wish = os.environ.get("FISHLEG_FAST_CUDA", "").strip()
        if wish not in CUDA_CHOICES:
            raise SystemExit(f"FISHLEG_FAST_CUDA should be 0, 1 or unset, but is: {wish!r}")
        cuda = CUDA_CHOICES[wish]
        version = self.distribution.get_version()
        extension = Path(self.get_ext_fullpath(ext.name)).resolve()
        # An editable build's own folder is temporary; one that stays lets Ninja rebuild only what changed.
        build_root = ROOT / "build" / "editable" if self.editable_mode else Path(self.build_temp).resolve()
        build_dir = build_root / f"cmake-{sys.implementation.cache_tag}"

        extension.parent.mkdir(parents=True, exist_ok=True)
        reason_file = extension.with_name(REASON_FILE)
        for old in (extension, reason_file):  # whatever fails now must not leave an earlier build behind
            old.unlink(missing_ok=True)
        try:
            try:
                build(extension, build_dir, version, cuda)
            except BuildFailed as failure:
                if cuda != "AUTO" or not found_nvcc(build_dir):
                    raise
                say(f"the build with CUDA failed ({failure}); building without CUDA")
                shutil.rmtree(build_dir)  # CMake remembers the compiler that failed
                build(extension, build_dir, version, "OFF", NVCC_FAILED)
        except BuildFailed as failure:
            shutil.rmtree(build_dir, ignore_errors=True)
            if cuda == "ON":
                raise SystemExit(f"FISHLEG_FAST_CUDA=1, but the build with CUDA failed: {failure}") from None
            say(f"the compiled extension could not be built: {failure}")
            say("installing without it; the plain torch and Triton backends do not need it")
            reason_file.write_text(f"{failure}\n", encoding="utf-8")

    def copy_extensions_to_source(self) -> None:
        """Editable installations: carries the reason over too, and removes what an earlier build left."""
        super().copy_extensions_to_source()
        package = ROOT / "fishleg_fast"
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            reason = built.with_name(REASON_FILE)
            for file in (built, reason):
                if not file.exists():
                    (package / file.name).unlink(missing_ok=True)
            if reason.exists():
                self.copy_file(str(reason), str(package / REASON_FILE))


# kernels/ is installed as fishleg_fast.kernels. The link fishleg_fast/kernels serves imports from a checkout;
# an sdist has no link, so the packages below must not be found through it.
packages = find_packages(include=["fishleg_fast", "fishleg_fast.*"], exclude=["fishleg_fast.kernels*"])
packages += ["fishleg_fast.kernels", *(f"fishleg_fast.kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=packages,
    package_dir={"fishleg_fast": "fishleg_fast", "fishleg_fast.kernels": "kernels"},
    ext_modules=[Extension("fishleg_fast._native", sources=[], optional=True)],
    cmdclass={"build_py": FreshBuild, "build_ext": CMakeBuild},
)
