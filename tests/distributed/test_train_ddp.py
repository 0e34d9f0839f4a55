"""The training script for several processes, by torchrun, for a few steps."""

from __future__ import annotations

import pytest

from benchmarks.train import train_ddp

pytest.importorskip("sklearn")


def test_it_ends_in_a_table_of_both_trainings(capfd: pytest.CaptureFixture[str]) -> None:
    assert train_ddp.main(["--dataset", "digits", "--steps", "4", "--batch-size", "64"]) == 0
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in capfd.readouterr().out.splitlines() if "|" in line]
    (header, _, one, two) = rows
    found = [dict(zip(header, row, strict=True)) for row in (one, two)]
    assert [r["processes"] for r in found] == ["1", "2"] and found[0]["averaged, MB"] == "0.00"
    assert float(found[1]["averaged, MB"]) > 0 and found[0]["λ, MB"] == found[1]["λ, MB"]
    losses = [float(r["train NLL"]) for r in found]
    assert abs(losses[0] - losses[1]) < 0.1 * losses[0]
