"""The timing benchmarks: the published way computes what it says, and the scripts run end to end on small problems.

Nothing here is about how long anything takes.
"""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from dense import flat, randn, relative
from torch import nn

from fishleg_fast import BernoulliLikelihood

for needed in ("numpy", "sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(needed)

BENCHMARKS = str(Path(__file__).resolve().parent.parent / "benchmarks")
sys.path.insert(0, BENCHMARKS)  # they import each other by short names, as scripts do
try:
    import convergence
    import published as published_way
    import step_time
    import training
    import wallclock
    from train_autoencoder import autoencoder_problem
finally:
    sys.path.remove(BENCHMARKS)


# ---- the published way


def published(bias=True, **settings):
    """A small model in float64 with random λ, and gradients of one batch; (optimizer, inputs)."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4, bias=bias), nn.ReLU(), nn.Linear(4, 5)).double()
    optimizer = published_way.Published(model, BernoulliLikelihood(), **settings)
    for k, layer in enumerate(optimizer.layers):
        layer.R.data.copy_(randn(*layer.R.shape, seed=2 * k))
        layer.L.data.copy_(randn(*layer.L.shape, seed=2 * k + 1))
    inputs = randn(6, 5, seed=9).sigmoid()
    optimizer.likelihood.nll(inputs, model(inputs)).backward()
    return optimizer, inputs


@pytest.mark.parametrize("bias", [True, False])
def test_published_theta_step_follows_the_dense_kronecker_matrix(bias):
    optimizer, _ = published(bias, lr=0.3, beta=0.5)
    before = [p.detach().clone() for p in optimizer.params]
    want = []
    for layer in optimizer.layers:
        w, b = layer.weight.grad, None if layer.bias is None else layer.bias.grad
        g = w if b is None else torch.cat([w, b[:, None]], 1)
        Q = torch.kron(layer.R.T @ layer.R, layer.L @ layer.L.T).detach()
        natural = (Q @ g.reshape(-1)).reshape(g.shape)
        want += [natural] if b is None else [natural[:, :-1], natural[:, -1]]
    optimizer.theta_step()
    optimizer.theta_step()  # m = Qg (1 − β), then Qg (1 − β²)
    moved = flat([p.detach() - q for p, q in zip(optimizer.params, before, strict=True)])
    assert relative(moved, flat([-0.3 * (0.5 + 0.75) * w for w in want])) < 1e-12


def test_published_fisher_product_is_the_hessian_on_the_drawn_labels():
    optimizer, inputs = published()
    model, likelihood = optimizer.model, optimizer.likelihood
    before = [p.detach().clone() for p in optimizer.params]
    vs = [randn(*layer.momentum.shape, seed=3) for layer in optimizer.layers]
    torch.manual_seed(5)
    got = optimizer.fisher_product(inputs, vs)
    assert all(torch.equal(p, q) for p, q in zip(optimizer.params, before, strict=True))
    torch.manual_seed(5)
    labels = likelihood.draw(model(inputs).detach())
    grads = torch.autograd.grad(likelihood.nll(labels, model(inputs)), optimizer.params, create_graph=True)
    pieces = [piece for layer, v in zip(optimizer.layers, vs, strict=True) for piece in layer.split(v)]
    want = torch.autograd.grad(grads, optimizer.params, pieces)
    got = [piece for layer, Fv in zip(optimizer.layers, got, strict=True) for piece in layer.split(Fv)]
    assert relative(flat(got), flat(want)) < 1e-6


def test_published_aux_gradient_is_the_closed_form(monkeypatch):
    optimizer, inputs = published(damping=0.2, aux_lr=0.1, curvature_batch=3)
    products = [randn(*layer.momentum.shape, seed=4) for layer in optimizer.layers]
    seen = []
    monkeypatch.setattr(optimizer, "fisher_product", lambda x, vs: seen.append(len(x)) or products)
    λ = [{name: getattr(layer, name).detach().clone() for name in "RL"} for layer in optimizer.layers]
    gs = [layer.gradient() for layer in optimizer.layers]
    norm = flat(gs).norm()
    optimizer.aux_update(inputs)
    assert seen == [3]
    for layer, aux, g, Fv in zip(optimizer.layers, λ, gs, products, strict=True):
        R, L = aux["R"], aux["L"]
        P, S, u = R.T @ R, L @ L.T, g / norm
        w = Fv + 0.2 * (P @ u @ S) - u
        M, N = u.T @ P @ w, w @ S @ u.T
        want = {"L": (M + M.T) @ L, "R": R @ (N + N.T)}
        for name in "RL":
            assert relative(getattr(layer, name).grad, want[name]) < 1e-12
            moved = getattr(layer, name).detach() - aux[name]
            assert relative(moved, -0.1 * want[name].sign()) < 1e-4  # Adam's first step


def test_published_step_updates_aux_when_due_and_refuses_other_layers():
    optimizer, inputs = published(update_aux_every=2)
    calls = []
    optimizer.aux_update = calls.append
    for _ in range(3):
        optimizer.step(inputs)
    assert len(calls) == 2
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="call backward"):
        optimizer.theta_step()
    with pytest.raises(ValueError, match=r"nn\.Linear only"):
        published_way.Published(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), BernoulliLikelihood())


# ---- step_time


def test_exponent_of_exact_powers():
    widths = [250, 500, 1000, 2000]
    assert step_time.exponent(widths, [7e-3 * w**2.5 for w in widths]) == pytest.approx(2.5)
    assert step_time.exponent(widths, [3.0] * 4) == pytest.approx(0)


def test_stopwatch_counts_only_what_it_watches():
    class Worker:
        def work(self, x):
            return 2 * x

    worker, clock = Worker(), step_time.Stopwatch()
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
    assert list(entries) == list(step_time.CONTESTANTS)
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


# ---- wallclock


def test_time_to_the_first_evaluation_at_the_target():
    curve = [[10, 1.0, 90.0], [20, 2.0, None], [30, 3.0, 60.0], [40, 4.0, 65.0], [50, 5.0, 50.0]]
    assert wallclock.time_to(curve, 95) == 1
    assert wallclock.time_to(curve, 60) == 3
    assert wallclock.time_to(curve, 59.9) == 5
    assert wallclock.time_to(curve, 49) is None


def test_race_rows_pair_the_seeds():
    def record(seconds, nll, curve=()):
        return {"seconds": seconds, "train nll": nll, "curve": curve}

    mine = {0: record(8, 40, [[1, 2.0, 70], [2, 8.0, 40]]), 1: record(9, 41, [[1, 3.0, 70], [2, 9.0, 41]])}
    rival = {0: record(16, 50.0), 1: record(18, 50.0), 2: record(20, 50.0)}
    assert wallclock.race_rows(mine, rival) == ["50, 50", "8, 9", "16, 18", "0.5, 0.5", "0.5"]
    rival[1]["train nll"] = 30.0
    assert wallclock.race_rows(mine, rival)[3:] == ["0.5, not reached", "not reached"]


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
    monkeypatch.setattr(wallclock, "autoencoder_problem", lambda name: autoencoder_problem("digits"))
    short = {n: convergence.Entry({100: s}, {}) for n, s in (("adamw", 6), ("muon", 3), ("fishleg", 4))}
    monkeypatch.setattr(wallclock, "ENTRIES", short)
    results = tmp_path / "new" / "wallclock.jsonl"
    study = tmp_path / "study.jsonl"
    study.write_text(
        "\n".join(
            json.dumps({"optimizer": n, "batch": 100, "steps": s, "lr": lr, "seed": 0, "train nll": nll})
            for n, s, lr, nll in [
                ("adamw", 6, 1e-3, 30.0), ("adamw", 6, 2e-3, 20.0), ("adamw", 5, 4e-3, 10.0), ("muon", 3, 1e-2, 9.0)
            ]
        )
    )  # fmt: skip
    flags = ["--batch", "100", "--seeds", "0", "--results", str(results), "--study", str(study)]
    assert wallclock.main(["--only", "adamw,muon,fishleg", *flags]) == 0
    assert "AdamW, batch 100: lr 0.002, the best of 0.001, 0.002" in capsys.readouterr().out
    records = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(r["optimizer"], r["steps"]) for r in records] == [("adamw", 6), ("muon", 3), ("fishleg", 4)]
    for r in records:
        assert [step for step, _, _ in r["curve"]] == list(range(1, r["steps"] + 1))
        assert r["curve"][-1] == [r["steps"], pytest.approx(r["seconds"], abs=1e-3), r["train nll"]]
        assert str(tmp_path) not in json.dumps(r)
    assert (tmp_path / "new" / "wallclock.png").read_bytes().startswith(b"\x89PNG")

    # What is there is not repeated; a schedule of another length is a run of its own.
    assert wallclock.main(["--only", "adamw,fishleg", "--steps-fishleg", "2", *flags]) == 0
    records = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(r["optimizer"], r["steps"]) for r in records[3:]] == [("fishleg", 2)]
    assert "--steps-fishleg 2" in records[-1]["command"]
    text = results.with_suffix(".md").read_text()
    for row in (
        "FishLeg, 4 steps, lr 0.01: to AdamW, 6 steps, lr 0.002",
        "FishLeg, 2 steps, lr 0.01: to Muon, 3 steps",
    ):
        assert row in text


def test_wallclock_says_what_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit, match="has no runs yet"):
        wallclock.main(["--report", "--results", str(tmp_path / "none.jsonl")])
    with pytest.raises(SystemExit, match="has no runs of muon at batch 100"):
        wallclock.main(["--only", "muon", "--batch", "100", "--study", str(tmp_path / "none.jsonl")])
    with pytest.raises(SystemExit):
        wallclock.main(["--batch", "7"])
    assert "unknown: [7]" in capsys.readouterr().err
