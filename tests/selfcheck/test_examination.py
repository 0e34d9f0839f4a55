"""Checks in a child process: of what is right, wrong, raises, hangs, dies, or spoils the device for later calls."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from fishleg_fast.selfcheck import conversation, examination
from fishleg_fast.selfcheck.conversation import CannotStart, Conversation
from fishleg_fast.selfcheck.examination import Examination, Subject
from fishleg_fast.selfcheck.families import FAMILIES
from fishleg_fast.selfcheck.verdict import TOGETHER, Finding, Verdict

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(examination.SCALES, "cpu", "least")


def subject(*names: str) -> Subject:
    return Subject({name.lower(): f"support.faulty_ops:{name}" for name in names}, CPU, torch.float32)


def findings(about: Subject, precision: str) -> list[Finding]:
    with Examination(about) as examined:
        return list(examined.findings(precision))


def test_each_fault_is_found_and_the_rest_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five backends with a fault each; the child is started anew where it hangs, dies or is of no use any more."""
    monkeypatch.setattr(conversation, "ANSWER_SECONDS", 5.0)
    found = findings(subject("WRONG", "RAISING", "HANGING", "DYING", "SPOILING"), "highest")
    faults = {(f.backend, f.family): f.fault for f in found if f.fault}
    assert len(found) == 5 * len(FAMILIES) + 1
    assert set(faults) == {
        ("wrong", "qv"), ("raising", "lambda_step"), ("hanging", "spectral"), ("dying", "refresh"),
        ("spoiling", "inner"),
    }  # fmt: skip
    assert "case 'odd'" in faults["wrong", "qv"] and "1.0e-02, more than 1e-04" in faults["wrong", "qv"]
    assert faults["raising", "lambda_step"] == "raised RuntimeError: no kernel image is available"
    assert faults["hanging", "spectral"] == "gave no answer within 5 s"
    assert faults["dying", "refresh"].startswith(f"died of {signal.SIGKILL.name}")
    assert "illegal memory access" in faults["spoiling", "inner"]
    right = [f for f in found if not f.fault]
    assert all(set(f.errors) == set(f.reference) == {"odd"} for f in right)
    assert all(0 < f.worst <= f.limit < 1 for f in right)
    assert found[-1].backend == TOGETHER and not found[-1].fault
    assert Verdict(found).lasting and Verdict(found).seconds > 0
    choice = Verdict(found).choice(["wrong", "raising"], {})
    assert {family: by["small"] for family, by in choice.items() if by["small"] != "wrong"} == {"qv": "raising"}


def test_what_cannot_be_imported_is_a_fault() -> None:
    found = findings(Subject({"gone": "support.no_such_ops:"}, CPU, torch.float32), "highest")
    assert [f.family for f in found] == list(FAMILIES), "nothing is left to be tried together"
    assert all("cannot be imported: ModuleNotFoundError" in f.fault for f in found)


@pytest.mark.parametrize(
    ("executable", "reason"),
    [
        (None, "not run by a Python"),
        ("/no/such/python", "cannot be started"),
        ("#!/bin/sh\nexit 3", "ended with status 3"),
        ("#!/bin/sh\nread line; echo hello; read line", "answers as another program"),
        ("#!/bin/sh\nread line; exec sleep 60", "gave no answer within 1 s"),
    ],
)
def test_without_a_child_process_it_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, executable: str | None, reason: str
) -> None:
    if executable is not None and executable[0] == "#":
        program = tmp_path / "program"
        program.write_text(executable)
        program.chmod(0o755)
        executable = str(program)
    monkeypatch.setattr(conversation.spawn, "get_executable", lambda: executable)
    monkeypatch.setattr(conversation, "START_SECONDS", 1.0)
    with pytest.raises(CannotStart, match=reason):
        Conversation(subject("RIGHT").request())


def test_a_device_that_takes_no_context_is_no_verdict() -> None:
    absent = Subject({"right": "support.faulty_ops:RIGHT"}, torch.device("cuda:77"), torch.float32)
    with pytest.raises(CannotStart):
        findings(absent, "highest")


def test_every_case_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(examination.SCALES, "cpu", "tiny")
    found = findings(subject("RIGHT"), "high")
    assert all(f.fault is None and set(f.errors) == set(f.reference) == {"odd", "grouped", "large"} for f in found)
