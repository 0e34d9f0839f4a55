"""The convergence study: the search for an lr, Muon and the report, end to end on the digits."""

import dataclasses
import json
from functools import cache

import pytest
import torch
from torch import nn

pytest.importorskip("numpy")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks.common.models import DIGITS_WIDTHS, GPT, ResNet18, autoencoder
from benchmarks.common.muon import Muon
from benchmarks.common.optimizers import OPTIMIZERS, hidden_matrices
from benchmarks.study import convergence, problems, tuning
from benchmarks.train.train_autoencoder import autoencoder_problem

SEEDS = (0, 1, 2)


def search(loss, grid, margin=0.1, most=100):
    """What the search runs, of a loss(lr, seed)."""
    found: dict = {}
    for _ in range(most):
        runs = tuning.next_runs(found, grid, SEEDS, margin)
        if not runs:
            return found
        for lr, seed in runs:
            assert seed not in found.get(lr, {})
            found.setdefault(lr, {})[seed] = loss(lr, seed)
    raise AssertionError("the search does not end")


@pytest.mark.parametrize("best", [1e-3, 1e-2, 7e-2, 0.1])
def test_search_ends_with_the_best_inside(best):
    found = search(lambda lr, seed: 10 + 3 * abs(torch.tensor(lr / best).log().item()), (5e-3, 1e-2, 2e-2))
    chosen = tuning.best_lr(found)
    assert not tuning.at_edge(found) and best / 2 < chosen < best * 2
    assert set(found[chosen]) == set(SEEDS)
    assert any(set(by_seed) == {0} for by_seed in found.values())  # what is far from the best is left alone


def test_search_goes_on_where_other_seeds_move_the_best_to_the_edge():
    losses = {1: (10.0, 12, 12), 2: (9.9, 9.9, 9.9), 4: (9.91, 9.0, 9.0), 8: (10.5, 11, 11), 16: (30, 30, 30)}
    found = search(lambda lr, seed: losses[lr][seed], (1, 2, 4))
    assert tuning.best_lr(found) == 4 and 8 in found


def test_search_is_bounded_and_a_grid_of_one_stays_one():
    widened = search(lambda lr, seed: 1 / lr, (1, 2, 4), margin=0.0)
    assert max(widened) < 4 * tuning.WIDEST and tuning.at_edge(widened)
    assert search(lambda lr, seed: 1.0, (3,)) == {3: dict.fromkeys(SEEDS, 1.0)}


def test_best_lr_is_among_those_with_most_seeds():
    assert tuning.best_lr({1: {0: 5.0, 1: 5.0}, 2: {0: 4.0}, 3: {0: 4.9, 1: 5.0}}) == 3


def test_muon_is_torchs_but_for_its_rounding():
    torch.manual_seed(0)
    for shape in ((30, 20), (20, 30)):
        start, target = torch.randn(shape), torch.randn(shape)
        ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
        optimizers = [
            Muon([ours], lr=0.1),
            torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        ]
        for _ in range(3):
            for p, o in zip((ours, theirs), optimizers, strict=True):
                p.grad = p.detach() - target
                o.step()
        assert (ours - theirs).norm() < 0.02 * (ours - start).norm()


def test_muon_takes_a_kernel_as_a_matrix():
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(8, 3, 3, 3))
    matrix = nn.Parameter(kernel.detach().view(8, 27).clone())
    kernel.grad = torch.randn(8, 3, 3, 3).contiguous(memory_format=torch.channels_last)
    matrix.grad = kernel.grad.reshape(8, 27)
    for p in (kernel, matrix):
        Muon([p], lr=0.1).step()
    assert torch.allclose(kernel.view(8, 27), matrix)
    with pytest.raises(ValueError, match="matrices and convolutions"):
        Muon([nn.Parameter(torch.zeros(3))])


def test_muons_rest_is_embeddings_head_and_vectors():
    gpt, resnet = GPT(layers=1, width=8, heads=2), ResNet18(1, width=4)
    names = lambda model: [n for n, p in model.named_parameters() if any(p is q for q in hidden_matrices(model))]
    assert names(gpt) == [f"blocks.0.{n}.weight" for n in ("qkv", "out", "up", "down")]
    assert "stem.weight" in names(resnet) and not {"head.weight", "norm.weight"} & set(names(resnet))
    assert len(hidden_matrices(autoencoder(DIGITS_WIDTHS))) == 8
    muon, adamw = OPTIMIZERS["muon-rest-x3"].make(gpt, None, 0.01)
    assert adamw.defaults["lr"] == pytest.approx(0.03) and muon.defaults["lr"] == 0.01
    count = lambda o: sum(len(group["params"]) for group in o.param_groups)
    assert count(muon) + count(adamw) == len(list(gpt.parameters()))


@pytest.fixture
def small(monkeypatch):
    """All problems become a few steps on the digits."""
    make = cache(lambda: autoencoder_problem("digits"))
    for name, problem in problems.PROBLEMS.items():
        changed = dataclasses.replace(problem, make=make, steps=3, batch=50, warmup=min(problem.warmup, 1))
        monkeypatch.setitem(problems.PROBLEMS, name, changed)


def test_study_end_to_end(small, tmp_path, capsys):
    results = tmp_path / "new" / "study.jsonl"
    flags = ["--problem", "gpt,curves-100", "--only", "adamw,adamw-0.95,muon,fishleg", "--results", str(results)]
    assert convergence.main([*flags, "--lr", "1e-2,2e-2", "--seeds", "0,1"]) == 0
    assert convergence.main([*flags, "--stage", "report", "--seeds", "3,4"]) == 0
    assert convergence.main([*flags[:2], *flags[4:], "--stage", "robust", "--seeds", "3,4"]) == 0
    records = [json.loads(line) for line in results.read_text().splitlines()]
    runs = [(r["problem"], r["optimizer"], r["seed"]) for r in records]
    assert len(runs) == 7 * 4 + 6 * 2 + 2 * 3 * 2  # one of AdamW's two rows on the GPT is reported
    assert set(runs[40:]) == {(p, "fishleg", s) for p in ("gpt", "curves-100") for s in (3, 4)}
    for r in records:
        assert r["steps done"] == r["steps"] == 3 and r["threads"] == 1
        assert r["last 50 loss"] == pytest.approx(sum(r["losses"]) / 3, rel=1e-4)
        assert str(tmp_path) not in json.dumps(r)
    text = results.with_suffix(".md").read_text()
    for words in ("## GPT", "## CURVES autoencoder, batch 100", "FishLeg's mean / its mean", "of its best lr", "EDGE"):
        assert words in text
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    # What is there is not repeated, unless --redo says so.
    assert convergence.main([*flags, "--stage", "report", "--seeds", "3,4"]) == 0
    assert len(results.read_text().splitlines()) == len(records)
    again = ["--problem", "gpt", "--only", "muon", "--lr", "1e-2", "--seeds", "0", "--results", str(results)]
    assert convergence.main([*again, "--redo"]) == 0
    assert len(results.read_text().splitlines()) == len(records) + 1
    capsys.readouterr()


def test_report_says_where_a_peer_is_better(small):
    from benchmarks.study.convergence_report import verdict

    def runs(*nlls):
        return [{"problem": "resnet", "seed": s, "train nll": nll} for s, nll in enumerate(nlls, 3)]

    assert verdict(runs(2.0, 2.0), runs(1.0, 1.0)) == ("2", "BETTER THAN FISHLEG, with 2 of 2 seeds")
    assert verdict(runs(1.0, 1.0), runs(0.5, 3.0)) == ("0.5714", "better with 1 of 2 seeds")
    assert verdict(runs(1.0, 1.0), runs(2.0, 2.0)) == ("0.5", "")
    assert verdict([], runs(1.0)) == ("", "")


def test_study_says_what_is_wrong(tmp_path, capsys):
    with pytest.raises(SystemExit, match="has no runs yet"):
        convergence.main(["--report", "--results", str(tmp_path / "none.jsonl")])
    with pytest.raises(SystemExit):
        convergence.main(["--problem", "mnist"])
    assert "unknown: ['mnist']" in capsys.readouterr().err
