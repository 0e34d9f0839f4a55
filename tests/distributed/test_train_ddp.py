"""The training script for several processes, by torchrun, for a few steps."""

from __future__ import annotations

import pytest

from benchmarks.train import train_ddp

pytest.importorskip("sklearn")


def test_it_ends_in_a_table_of_all_trainings(capfd: pytest.CaptureFixture[str]) -> None:
    assert train_ddp.main(["--dataset", "digits", "--steps", "4", "--batch-size", "64"]) == 0
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in capfd.readouterr().out.splitlines() if "|" in line]
    header, _, *runs = rows
    found = [dict(zip(header, row, strict=True)) for row in runs]
    assert [(r["processes"], r["way"]) for r in found] == [("1", ""), *(("2", way) for way in train_ddp.WAYS)]
    one, *others = found
    assert one["handed over"] == "0.00" and all(float(r["handed over"]) > 0 for r in others)
    held = [float(r["λ"]) for r in found]
    assert held[0] == held[1] and max(held[2:]) < 0.75 * held[0]
    losses = [float(r["train NLL"]) for r in found]
    assert max(losses) < 1.1 * min(losses)
