"""The study of seconds to a loss runs end to end on small problems.

Nothing here is about how long anything takes.
"""

import json
from dataclasses import replace

import pytest
from torch import nn

pytest.importorskip("numpy")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks.study import problems, wallclock, wallclock_report
from benchmarks.train import training
from benchmarks.train.train_autoencoder import autoencoder_problem


def test_time_to_the_first_evaluation_at_the_target():
    curve = [[10, 1.0, 90.0], [20, 2.0, None], [30, 3.0, 60.0], [40, 4.0, 65.0], [50, 5.0, 50.0]]
    assert wallclock_report.time_to(curve, 95) == 1
    assert wallclock_report.time_to(curve, 60) == 3
    assert wallclock_report.time_to(curve, 59.9) == 5
    assert wallclock_report.time_to(curve, 49) is None


def test_race_rows_pair_the_seeds():
    def record(seconds, nll, curve=()):
        return {"seconds": seconds, "train nll": nll, "curve": curve}

    mine = {0: record(8, 40, [[1, 2.0, 70], [2, 8.0, 40]]), 1: record(9, 41, [[1, 3.0, 70], [2, 9.0, 41]])}
    rival = {0: record(16, 50.0), 1: record(18, 50.0), 2: record(20, 50.0)}
    assert wallclock_report.race_rows(mine, rival) == ["50, 50", "8, 9", "16, 18", "0.5, 0.5", "0.5"]
    rival[1]["train nll"] = 30.0
    assert wallclock_report.race_rows(mine, rival)[3:] == ["0.5, not reached", "not reached"]


def test_train_stops_its_clocks_while_it_is_watched(monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock["now"])
    seen = []

    def every(seconds, model):
        assert isinstance(model, nn.Module)
        seen.append(seconds)
        clock["now"] += 100

    problem = autoencoder_problem("digits")
    batch = problem.batch

    def timed_batch(*args):
        clock["now"] += 1
        return batch(*args)

    object.__setattr__(problem, "batch", timed_batch)  # a second for each step; the dataclass is frozen
    run = training.train(problem, "adamw", 1e-3, 3, 50, progress=False, every=every)
    assert seen == run.times == [1, 2, 3]


def test_wallclock_end_to_end(tmp_path, monkeypatch, capsys):
    make = lambda: autoencoder_problem("digits")
    for name, sample in (("curves-100", None), ("gpt", 20)):
        changed = replace(problems.PROBLEMS[name], make=make, steps=4, batch=50, sample=sample)
        monkeypatch.setitem(problems.PROBLEMS, name, changed)
    results = tmp_path / "new" / "wallclock.jsonl"
    study = tmp_path / "study.jsonl"
    lines = [
        {"problem": p, "optimizer": n, "steps": 4, "lr": lr, "seed": seed, "train nll": nll, "last 50 loss": nll}
        for p in ("curves-100", "gpt")
        for n, lr, seed, nll in [
            ("adamw", 1e-3, 0, 30.0), ("adamw", 2e-3, 0, 20.0), ("adamw", 4e-3, 3, 10.0), ("muon", 1e-2, 0, 9.0),
            ("fishleg", 1e-2, 0, 8.0),
        ]
    ]  # fmt: skip
    study.write_text("\n".join(map(json.dumps, lines)))
    flags = ["--problem", "curves-100,gpt", "--seeds", "0", "--results", str(results), "--study", str(study)]
    assert wallclock.main(["--only", "adamw,muon,fishleg", *flags]) == 0
    assert "AdamW, curves-100: lr 0.002, the best of 0.001, 0.002" in capsys.readouterr().out
    records = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(r["problem"], r["optimizer"]) for r in records] == [
        (p, n) for p in ("curves-100", "gpt") for n in ("adamw", "muon", "fishleg")
    ]
    for r in records:
        assert [step for step, _, _ in r["curve"]] == list(range(1, r["steps"] + 1))
        assert r["curve"][-1] == [r["steps"], pytest.approx(r["seconds"], abs=1e-3), r["train nll"]]
        assert str(tmp_path) not in json.dumps(r)
    assert (tmp_path / "new" / "wallclock.png").read_bytes().startswith(b"\x89PNG")

    # What is there is not repeated; a schedule of another length is a run of its own.
    assert wallclock.main(["--only", "adamw,fishleg", "--steps-fishleg", "2", *flags]) == 0
    records = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(r["optimizer"], r["steps"]) for r in records[6:]] == [("fishleg", 2)] * 2
    assert "--steps-fishleg 2" in records[-1]["command"]
    text = results.with_suffix(".md").read_text()
    for row in (
        "FishLeg, 4 steps, lr 0.01: to AdamW, 4 steps, lr 0.002",
        "FishLeg, 2 steps, lr 0.01: to Muon, 4 steps",
    ):
        assert row in text


def test_wallclock_says_what_is_missing(tmp_path, capsys):
    none = str(tmp_path / "none.jsonl")
    with pytest.raises(SystemExit, match="has no runs yet"):
        wallclock.main(["--report", "--results", none])
    with pytest.raises(SystemExit, match="has no tuning runs of muon on curves-100"):
        wallclock.main(["--only", "muon", "--problem", "curves-100", "--study", none, "--results", none])
    with pytest.raises(SystemExit):
        wallclock.main(["--problem", "mnist"])
    assert "unknown: ['mnist']" in capsys.readouterr().err
