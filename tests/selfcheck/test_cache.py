"""The cache folder: where it is; files that are missing, broken, of something else, unwritable or written twice."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fishleg_fast.selfcheck import cache
from fishleg_fast.selfcheck.identity import identity, kernels_digest
from fishleg_fast.selfcheck.tuning.table import Tune
from fishleg_fast.selfcheck.verdict import Finding, Verdict

KEY = {"device": "a", "version": "1"}


def test_what_was_saved_is_loaded_for_the_same_key_alone(folder: Path) -> None:
    assert cache.load("verdict", KEY, list) is None
    path = cache.save("verdict", KEY, [1, 2])
    assert path is not None and path.parent == folder and [p.name for p in folder.iterdir()] == [path.name]
    assert cache.load("verdict", KEY, list) == [1, 2]
    assert cache.load("verdict", {**KEY, "version": "2"}, list) is None
    assert cache.load("tune", KEY, list) is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"key": {}}', '{"key": {}, "value": [1]}', "\x00\xff", '{"key": null, "value": 3}']
)
def test_a_broken_file_counts_as_missing_and_is_told_once(
    folder: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = cache.save("verdict", KEY, [1])
    assert path is not None
    path.write_text(text, encoding="latin-1")
    with caplog.at_level(logging.WARNING, "fishleg_fast"):
        assert cache.load("verdict", KEY, list) is None
    assert len(caplog.records) == 1 and str(path) in caplog.text and "ignored" in caplog.text
    assert cache.save("verdict", KEY, [2]) == path and cache.load("verdict", KEY, list) == [2]


def test_what_is_not_what_it_should_be_counts_as_missing(folder: Path) -> None:
    """Files of the right name with values of another kind, as an older or newer version of ours may have written."""
    good = Finding("triton", "qv", "high", {"odd": 1e-3}, {}, 1e-2)
    for value in (
        [{"backend": "triton"}],
        [],
        {},
        3,
        [{**good.__dict__, "colour": 1}],
        [{**good.__dict__, "family": "x"}],
    ):
        cache.save("verdict", KEY, value)
        assert cache.load("verdict", KEY, Verdict.from_json) is None
    cache.save("verdict", KEY, Verdict([good]).as_json())
    assert cache.load("verdict", KEY, Verdict.from_json) == Verdict([good])
    for value in ({"tiles": {"small": {"tf32": [64, 64, 32, 4]}}}, {"tiles": 3}, [], {"fastest": {"high": {"qv": 3}}}):
        cache.save("tune", KEY, value)
        assert cache.load("tune", KEY, Tune.from_json) is None


def test_infinite_errors_survive(folder: Path) -> None:
    wrong = Verdict([Finding("triton", "qv", "high", {"odd": float("inf")}, {}, 1e-2, "is wrong")])
    cache.save("verdict", KEY, wrong.as_json())
    assert cache.load("verdict", KEY, Verdict.from_json) == wrong


def test_a_folder_that_cannot_be_written_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file is in the folder's place, which not even root can write into."""
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING, "fishleg_fast"):
        assert cache.save("verdict", KEY, [1]) is None
    assert len(caplog.records) == 1 and "cannot be written" in caplog.text and cache.VARIABLE in caplog.text
    assert cache.load("verdict", KEY, list) is None


def test_a_disk_that_is_full_leaves_no_half_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.save("verdict", KEY, [1])

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    assert cache.save("verdict", KEY, [2]) is None
    assert len(list(folder.iterdir())) == 1 and cache.load("verdict", KEY, list) == [1]


def test_off_reads_and_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(cache.VARIABLE, "off")
    assert cache.save("verdict", KEY, [1]) is None and cache.load("verdict", KEY, list) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="the convention of Linux")
@pytest.mark.parametrize(
    ("xdg", "variable", "want"),
    [("/x", None, "/x/fishleg_fast"), (None, None, "/h/.cache/fishleg_fast"), ("", "", "/h/.cache/fishleg_fast"),
     ("relative", None, "/h/.cache/fishleg_fast"), ("/x", "~/mine", "/h/mine")],
)  # fmt: skip
def test_where_it_is(monkeypatch: pytest.MonkeyPatch, xdg: str | None, variable: str | None, want: str) -> None:
    monkeypatch.setenv("HOME", "/h")
    for name, value in {"XDG_CACHE_HOME": xdg, cache.VARIABLE: variable}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert cache.folder() == Path(want)


WRITER = """
import sys
from fishleg_fast.selfcheck import cache
for k in range(50):
    cache.save("verdict", {"a": 1}, [sys.argv[1]] * 20000)
    assert len(set(cache.load("verdict", {"a": 1}, list))) == 1, "half of each"
print(len(cache.load("verdict", {"a": 1}, list)))
"""


def test_two_processes_at_once(folder: Path) -> None:
    """Each reads whole files, its own or the other's, and none is left over."""
    both = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for name in "ab"
    ]
    for process in both:
        out, errors = process.communicate(timeout=120)
        assert (process.returncode, out.strip(), errors) == (0, "20000", "")
    assert len(list(folder.iterdir())) == 1


def test_the_identity_is_of_the_device_and_all_that_runs() -> None:
    about = identity(torch.device("cpu"))
    assert set(about) == {"device", "driver", "torch", "triton", "fishleg_fast", "kernels"}
    assert about["torch"] == torch.__version__ and len(kernels_digest()) == 16
    json.dumps(about)
