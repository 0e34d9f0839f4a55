"""What comes before the measurements, with the interpreter as it is: the extension built in place, the tests run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common.paths import ROOT

CUDA_PLACES = ("CUDA_HOME", "CUDA_PATH")
VERDICTS = {0: "passed", 5: "no test is marked gpu"}


def _module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def tools() -> dict[str, bool]:
    """What a build needs, and whether it is there. pip's cmake and ninja count."""
    which = lambda *names: any(shutil.which(n) for n in names)
    toolkits = [Path(os.environ[v]) for v in CUDA_PLACES if v in os.environ] + [Path("/usr/local/cuda")]
    return {
        "setuptools": _module("setuptools"),
        "pybind11": _module("pybind11"),
        "cmake": which("cmake") or _module("cmake"),
        "ninja": which("ninja") or _module("ninja"),
        "C++ compiler": "CXX" in os.environ or which("c++", "g++", "clang++"),
        "nvcc": "CUDACXX" in os.environ or which("nvcc") or any((t / "bin" / "nvcc").exists() for t in toolkits),
    }


def wait(process: subprocess.Popen[Any], seconds: float) -> int | None:
    """Exit status of a process that leads its own group; after so many seconds the group is killed: None."""
    try:
        return process.wait(timeout=max(seconds, 0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def run(command: list[str], log: Path, seconds: float) -> tuple[int | None, str]:
    """A command in the checkout: (exit status, its output); status None where it was cut off. Logged as it goes."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        status = wait(process, seconds)
    return status, log.read_text(errors="replace")


def build(out: Path, seconds: float) -> dict[str, Any]:
    """Build the extension in place by setup.py; {"built", "why" where not, "tools", "seconds", "says"}."""
    start, found = time.time(), tools()
    record: dict[str, Any] = {"tools": found, "built": False, "log": "build.log"}
    missing = [name for name, there in found.items() if not there and name != "nvcc"]
    if missing:
        return record | {"why": f"missing: {', '.join(missing)}", "seconds": 0.0}
    log = out / "build.log"
    status, text = run([sys.executable, "setup.py", "build_ext", "--inplace"], log, seconds)
    record["seconds"] = round(time.time() - start, 1)
    ask = "import json; from fishleg_fast import native; print(json.dumps([native.available(), native.cuda_status()]))"
    says, answer = run([sys.executable, "-c", ask], out / "native.log", 120)
    (out / "native.log").unlink()
    try:
        (built, why), (_, cuda) = json.loads(answer.splitlines()[-1])
    except (ValueError, IndexError):
        built, why, cuda = False, f"asking it failed with exit status {says}: {answer[-500:]}", ""
    if status is None:
        why = f"the build was cut off after {seconds:.0f} s; {why}"
    elif status:
        why = f"setup.py ended with exit status {status}: {text.strip()[-500:]}; {why}"
    record |= {"built": built and status == 0, "cuda": cuda}
    return record if record["built"] else record | {"why": why}


def test(out: Path, seconds: float) -> dict[str, Any]:
    """`pytest -m gpu`: {"verdict", "failed": whether a check failed, "summary", ...}."""
    if not _module("pytest"):
        return {"verdict": "pytest is missing: the kernels' own tests were not run", "failed": False}
    workers = ["-n", "4"] if _module("xdist") else []  # they compile kernels most of the time
    command = [
        sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider",
        "--continue-on-collection-errors", *workers, "tests",
    ]  # fmt: skip
    start = time.time()
    status, text = run(command, out / "pytest.log", seconds)
    lines = [line for line in text.splitlines() if line.strip()]
    record = {
        "command": " ".join(["python", *command[1:]]),
        "summary": lines[-1].strip("= ") if lines else "",
        "failures": [line for line in lines if re.match(r"(FAILED|ERROR) ", line)][:50],
        "seconds": round(time.time() - start, 1),
        "log": "pytest.log",
    }
    if status is None:
        done = "some failed before that" if "FAILED" in text or re.search(r"^[.sxX]*[FE]", text, re.M) else ""
        verdict = f"cut off after {seconds:.0f} s; {done or 'none had failed by then'}"
        return record | {"verdict": verdict, "failed": bool(done)}
    return record | {"verdict": VERDICTS.get(status, "FAILED"), "failed": status not in VERDICTS}
