"""The package as installed: version, extension, what an import pulls in, and ``python -m fishleg_fast``."""

import importlib
import json
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest

import fishleg_fast
import fishleg_fast.kernels
from fishleg_fast import native
from fishleg_fast.backends import registry

OPTIONAL = ["triton", "tensorboard", "transformers", "matplotlib", "tqdm", "sklearn", "pytorch_optimizer"]


@pytest.fixture
def replace_extension(monkeypatch):
    """A function that puts another object (None: nothing) in the extension's place."""

    def replace(module):
        monkeypatch.setitem(sys.modules, "fishleg_fast._native", module)

    return replace


def run_python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_version_is_the_same_everywhere():
    assert fishleg_fast.__version__ == metadata.version("fishleg_fast") == native.version()


def test_extension_is_built_and_says_what_it_is():
    ok, reason = native.available()
    assert ok, reason
    features = native.features()
    assert isinstance(features["cuda"], bool)
    assert features["compiler"]
    assert bool(features["cuda_compiler"]) == features["cuda"]


def test_cuda_status_gives_a_reason_or_a_device():
    ok, detail = native.cuda_status()
    assert isinstance(ok, bool)
    assert detail
    if not native.features()["cuda"]:
        assert not ok
        assert "without CUDA" in detail


def test_import_needs_no_optional_package():
    """Only what fishleg_fast itself imports counts: torch may import what it likes."""
    loaded = run_python(
        "-c",
        "import json, sys, torch; before = set(sys.modules); import fishleg_fast;"
        "print(json.dumps(sorted(set(sys.modules) - before)))",
    )
    top_level = {name.partition(".")[0] for name in json.loads(loaded)}
    assert "fishleg_fast" in top_level
    assert top_level.isdisjoint(OPTIONAL)


def test_kernels_are_part_of_the_package():
    assert fishleg_fast.kernels.__name__ == "fishleg_fast.kernels"
    installed = metadata.files("fishleg_fast") or []
    assert not any(file.parts[0] == "kernels" for file in installed), "another package owns that name"


def test_report_names_every_backend():
    out = run_python("-m", "fishleg_fast")
    assert fishleg_fast.__version__ in out
    shown = out.partition("\nbackends\n")[2].splitlines()
    rows = list(registry.report())
    assert rows
    for (name, (ok, reason)), line in zip(rows, shown, strict=True):
        assert line.split()[0] == name
        assert ("unavailable" in line) == (not ok)
        assert ok or reason in line


def test_extension_of_another_version_is_refused(replace_extension):
    stale = types.ModuleType("fishleg_fast._native")
    stale.__version__ = "0.0.1"
    replace_extension(stale)
    ok, reason = native.available()
    assert not ok
    assert "0.0.1" in reason
    assert fishleg_fast.__version__ in reason
    assert "reinstall" in reason
    assert native.cuda_status() == (False, reason)
    with pytest.raises(ImportError, match=r"built for fishleg_fast 0\.0\.1"):
        native.features()


@pytest.mark.parametrize("recorded", [None, "no C++ compiler was found"])
def test_missing_extension_says_why(replace_extension, monkeypatch, tmp_path: Path, recorded):
    replace_extension(None)
    reason_file = tmp_path / "_native_build.txt"
    if recorded:
        reason_file.write_text(recorded + "\n")
    monkeypatch.setattr(native, "_BUILD_REASON", reason_file)
    ok, reason = native.available()
    assert not ok
    assert "reinstall" in reason
    assert recorded is None or recorded in reason


def test_extension_that_does_not_load_says_so(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: whatever")

    monkeypatch.setattr(importlib, "import_module", broken)
    ok, reason = native.available()
    assert not ok
    assert "undefined symbol: whatever" in reason
    assert "reinstall" in reason
