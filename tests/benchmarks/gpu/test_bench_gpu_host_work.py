"""The table of host work: it is made without a GPU, launches nothing, and counts launches and uploads."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from benchmarks.gpu import host_work, host_work_triton


def test_counts() -> None:
    """Uploads of ordinary steps, whatever the time: one where gradients have moved or the host counts, none else."""
    rows = {row.op: row for row in host_work_triton.measure(6, 3)}
    assert {op: row.launches for op, row in rows.items() if "stay" not in op} == {
        "θ, rms": 3, "θ, spectral": 22, "λ": 4, "θ, rms, capturable": 3, "θ, spectral, capturable": 22,
        "λ, capturable": 4, "Q u": 2,
    }  # fmt: skip
    assert {op: row.uploads for op, row in rows.items() if "capturable, gradients stay" in op} == {
        "θ, rms, capturable, gradients stay": 0, "θ, spectral, capturable, gradients stay": 0,
    }  # fmt: skip
    assert all(row.uploads == 1 for op, row in rows.items() if "capturable, gradients stay" not in op)
    assert all(row.best_us > 0 and row.after_us > 0 for row in rows.values())


def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_work, "BACKENDS", ("triton", "none such"))
    monkeypatch.setattr(host_work.torch, "set_num_threads", lambda count: None)
    host_work.main(["--blocks", "3", "--repeats", "1"])
    said = capsys.readouterr().out
    assert "none such: not measured" in said and "torch" in said
    lines = [line for line in said.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(host_work_triton.measure(2, 1)) and "| triton | θ, rms | 3 |" in said
