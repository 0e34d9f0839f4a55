"""Step times are measured end to end on small problems.

Nothing here is about how long anything takes.
"""

import json
import math

import pytest

pytest.importorskip("tqdm")

from benchmarks.cpu import step_time
from benchmarks.cpu.contestants import CONTESTANTS, Stopwatch


def test_exponent_of_exact_powers():
    widths = [250, 500, 1000, 2000]
    assert step_time.exponent(widths, [7e-3 * w**2.5 for w in widths]) == pytest.approx(2.5)
    assert step_time.exponent(widths, [3.0] * 4) == pytest.approx(0)


def test_stopwatch_counts_only_what_it_watches():
    class Worker:
        def work(self, x):
            return 2 * x

    worker, clock = Worker(), Stopwatch()
    clock.watch(worker, "work", "aux")
    assert worker.work(3) == 6
    assert clock.seconds["aux"] > 0 and clock.seconds["anchor"] == 0


def test_step_time_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step_time, "WIDTHS", {"tiny": (12, 9, 4)})
    monkeypatch.setattr(step_time, "GROWTH", (4, 8))
    out = tmp_path / "new" / "step_time.json"
    assert step_time.main(["--rounds", "2", "--batch", "6", "--out", str(out)]) == 0
    records = json.loads(out.read_text())
    assert set(records) == {"tiny, batch 6", "growth, batch 6"}
    tiny = records["tiny, batch 6"]
    assert tiny["rounds"] == 2 and tiny["cycle"] % 10 == 0 and tiny["threads"] >= 1 and tiny["versions"]["torch"]
    assert str(tmp_path) not in out.read_text()
    entries = tiny["contestants"]
    assert list(entries) == list(CONTESTANTS)
    for name, entry in entries.items():
        fishleg = name.startswith("fishleg")
        assert all(entry[f]["median"] > 0 for f in ("whole", "passes", "step", "theta", "ordinary", "to adamw"))
        assert entry["whole"]["low"] <= entry["whole"]["median"] <= entry["whole"]["high"]
        assert (entry["anchor"] is not None) == fishleg and ("speed-up" in entry) == fishleg
        assert (entry["aux"] is not None) == (name != "adamw")
    assert entries["adamw"]["to adamw"]["median"] == 1
    growth = records["growth, batch 6"]["contestants"]["fishleg"]
    assert len(growth["ordinary"]["ms"]) == 2 and math.isfinite(growth["step"]["exponent"]["median"])
    text = out.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    for heading in ("12-9-4 and back", "growth", "faster than the published way", "exponent"):
        assert heading in text

    assert step_time.main(["--model", "tiny", "--rounds", "1", "--only", "published", "--out", str(out)]) == 0
    records = json.loads(out.read_text())
    assert set(records) == {"tiny, batch 6", "growth, batch 6", "tiny, batch 100"}  # the others stay
    assert set(records["tiny, batch 100"]["contestants"]) == {"adamw", "published"}


def test_step_time_refuses_unknown_contestants(capsys):
    with pytest.raises(SystemExit):
        step_time.main(["--only", "sgd"])
    assert "unknown: ['sgd']" in capsys.readouterr().err
