"""When steps are measured, and how far those between two measurements go."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fishleg_fast import CategoricalLikelihood, FishLeg
from support.dense import randn, relative
from support.limited import Watched, linear, mlp, take


def test_steps_near_the_limit_are_measured_up_to_every_fourth() -> None:
    training = Watched(50.0)
    training.take()
    for _ in range(60):  # the loss's own minimum is near: of other targets each time it is as far as ever
        training.y = training.y.neg()
        training.take()
    assert training.steps[:2] == [0, 1] and 4 in {b - a for a, b in pairwise(training.steps)}
    assert max(b - a for a, b in pairwise(training.steps)) == 4


def test_steps_far_from_it_ever_more_rarely() -> None:
    training = Watched(1e-6)
    training.take(30)
    assert training.steps == [0, 1, 3, 7, 15, 25]


@pytest.mark.parametrize(
    ("before", "found", "risen", "gap", "streak", "then"),
    [
        (2.0, 2.9, 1.0, 1, 1, 1),
        (2.0, 2.9, 1.0, 1, 2, 2),
        (2.0, 1.4, 1.0, 3, 8, 4),
        (2.0, 1.4, 1.0, 4, 30, 4),
        (2.0, 1.2, 1.0, 4, 30, 1),  # shorter than foretold
        (2.0, 3.1, 1.0, 4, 30, 1),  # longer
        (2.0, 3.1, 1.9, 2, 5, 3),  # as lr has it
        (1.0, 1.2, 0.2, 2, 5, 1),
        (0.4, 0.3, 1.0, 4, 9, 8),
        (0.1, 0.3, 1.0, 8, 3, 10),  # well within is well within
        (0.1, 0.49, 1.0, 10, 4, 2),
        (0.1, 0.6, 1.0, 10, 4, 1),
        (2.0, 0.0, 1.0, 4, 9, 1),  # it was not known
    ],
)
def test_when_the_next_measurement_is(
    before: float, found: float, risen: float, gap: int, streak: int, then: int
) -> None:
    limit = linear()[1]._limit
    assert limit is not None
    limit._length, limit._lr, limit._gap, limit._streak = before, 0.1, gap, streak
    limit._unread = 30, torch.tensor(found), 0.1 * risen
    state = limit.state()
    assert (state["limit_next"], state["limit_gap"]) == (30 + then, then)
    assert state["shortened_steps"] == (found > 1) and state["limit_streak"] in (0, streak + 1)


def test_the_first_measurement_foretells_nothing() -> None:
    limit = linear()[1]._limit
    assert limit is not None
    limit._unread = 0, torch.tensor(0.4), 1.0
    assert limit.state()["limit_next"] == 1


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}, {"backend": "reference"}])
def test_steps_between_measurements_are_taken_for_as_long_as_the_latest(settings: dict[str, Any]) -> None:
    (held, free), report = (Watched(1.0, **settings) for _ in range(2)), []
    for training, length in ((held, 4.0), (free, 0.5)):
        training.take()
        assert training.limit is not None
        with torch.no_grad():
            for p in training.net.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape))
        training.believe(length)
        training.limit._lr = 1.0
    for lr, factor in ((1.0, 0.25), (2.0, 0.125), (0.5, 0.5), (0.25, 1.0), (0.1, 1.0)):
        whole, part = free.step(lr), held.step(lr)
        for a, b in zip(whole, part, strict=True):
            assert relative(b, factor * a) < 1e-12
        report.append(held.optimizer.diagnostics()["step_scale"])
        with torch.no_grad():
            for p, q in zip(held.net.parameters(), free.net.parameters(), strict=True):
                p.copy_(q)
    assert report == [0.25, 0.125, 0.5, 1.0, 1.0]
    assert held.optimizer.diagnostics()["shortened_steps"] - free.optimizer.diagnostics()["shortened_steps"] == 3
    assert held.steps == free.steps == [0]


@pytest.mark.parametrize("told", ["nll", "gradient"])
def test_a_step_of_an_lr_that_has_risen_is_measured(told: str) -> None:
    likelihood, net, x, y = CategoricalLikelihood(), mlp(), randn(16, 4), torch.arange(16) % 3
    optimizer = FishLeg(net, likelihood=likelihood, lr=1e-5)
    nll = likelihood.nll if told == "nll" else lambda y, o: F.cross_entropy(o, y)
    for _ in range(15):
        take(net, optimizer, nll, x, y)
    assert optimizer.diagnostics()["shortened_steps"] == 0
    optimizer.param_groups[0]["lr"] = 100.0
    for _ in range(3):
        take(net, optimizer, nll, x, y)
    assert optimizer.diagnostics()["shortened_steps"] == 3


def test_targets_that_are_no_longer_known_end_the_holding() -> None:
    training = Watched(50.0)
    training.take(3)
    training.likelihood.nll = lambda y, o: F.mse_loss(o, y)  # type: ignore[method-assign]
    training.take(8)
    assert training.optimizer.diagnostics()["step_scale"] is None
