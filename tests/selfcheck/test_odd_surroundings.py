"""The check of kernels, and its cache, in odd surroundings; and lists with nothing in them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fishleg_fast.algebra.stacks import alike
from fishleg_fast.selfcheck import cache
from fishleg_fast.selfcheck.conversation import Conversation
from fishleg_fast.selfcheck.examination import Subject

KEY = {"device": "some"}
_CHILD = """
import torch
from fishleg_fast.selfcheck.conversation import Conversation
from fishleg_fast.selfcheck.examination import Subject
with Conversation(Subject({}, torch.device("cpu"), torch.float32).request()):
    print("started")
"""


def test_a_cache_folder_of_no_user_is_no_cache(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(cache.VARIABLE, "~there-is-no-such-user/cache")
    assert cache.save("verdict", KEY, 1) is None and cache.load("verdict", KEY, int) is None
    assert cache.VARIABLE in caplog.text


def test_a_cached_file_that_is_nested_too_deeply_counts_as_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    path = cache.save("verdict", KEY, 1)
    assert path is not None and json.loads(path.read_text())["value"] == 1
    path.write_text("[" * 200_000)
    assert cache.load("verdict", KEY, int) is None


def test_a_path_object_on_the_search_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])  # which Python's import leaves alone
    with Conversation(Subject({}, torch.device("cpu"), torch.float32).request()) as child:
        assert not child.over


def test_modules_in_the_working_folder_are_not_the_checks(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("loads = None\n")
    (tmp_path / "elsewhere").mkdir()
    script = tmp_path / "elsewhere" / "train.py"
    script.write_text(_CHILD)
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "started", done.stderr[-500:]


def test_what_has_no_entries_is_still_in_a_group() -> None:
    assert alike(["a", "a", None], [0, 3, 0]) == [[0, 1], [2]]
