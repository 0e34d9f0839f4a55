"""Denormal numbers count as zero in the optimizer's arithmetic, on all its threads, and nowhere else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fishleg_fast import FishLeg, GaussianLikelihood, native
from fishleg_fast.availability import Availability
from fishleg_fast.backends.denormals import denormals_flushed
from fishleg_fast.passes.inputs import Inputs
from fishleg_fast.passes.isolated import IsolatedPasses
from support.dense import randn

TINY = 1e-40


def flushed(count: int = 1) -> bool:
    """Whether products of denormal numbers are zero: of so many, on torch's workers too."""
    products = torch.full((count,), TINY) * torch.ones(count)
    return not products.count_nonzero()


def any_flushed(count: int) -> bool:
    return bool((torch.full((count,), TINY) * torch.ones(count) == 0).any())


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def user_flushes() -> Iterator[Callable[[], None]]:
    yield lambda: torch.set_flush_denormal(True)
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("two_threads")
def test_on_all_threads_inside_and_on_none_outside() -> None:
    many = 1 << 20
    assert not any_flushed(many)
    for _ in range(3):
        with denormals_flushed():
            assert flushed(many)
        assert not any_flushed(many)


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch, user_flushes: Callable[[], None]) -> None:
    monkeypatch.setattr(native, "available", lambda: Availability(False, "no extension"))
    with denormals_flushed():
        assert flushed()
    assert not flushed()
    user_flushes()
    with denormals_flushed():
        assert flushed()
    assert flushed()


def test_the_users_own_setting_stays(user_flushes: Callable[[], None]) -> None:
    user_flushes()
    with denormals_flushed():
        assert flushed()
    assert flushed()


def test_an_exception_restores_it() -> None:
    with pytest.raises(ZeroDivisionError), denormals_flushed():
        raise ZeroDivisionError
    assert not flushed()


def test_nested() -> None:
    with denormals_flushed():
        with denormals_flushed():
            assert flushed()
        assert flushed()
    assert not flushed()


def test_other_threads_are_left_alone() -> None:
    found: list[bool] = []
    with denormals_flushed():
        thread = threading.Thread(target=lambda: found.append(flushed()))
        thread.start()
        thread.join()
        # a new thread starts with what its parent had; one that was there before keeps its own
    ready, go = threading.Event(), threading.Event()

    def wait() -> None:
        ready.set()
        go.wait()
        found.append(flushed())

    thread = threading.Thread(target=wait)
    thread.start()
    ready.wait()
    with denormals_flushed():
        go.set()
        thread.join()
    assert found[1] is False


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_steps_and_auxiliary_passes(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer's own passes are flushed; the user's before and between are not."""
    inside: list[bool] = []
    run = IsolatedPasses.run

    def watched(self: IsolatedPasses, inputs: Inputs, seed: int, function: Callable[[], Any], **options: Any) -> Any:
        inside.append(flushed())
        return run(self, inputs, seed, function, **options)

    monkeypatch.setattr(IsolatedPasses, "run", watched)
    net, likelihood = nn.Sequential(nn.Linear(4, 3)), GaussianLikelihood()
    optimizer = FishLeg(net, likelihood=likelihood, backend=backend)
    x, y = randn(8, 4, dtype=torch.float32), randn(8, 3, dtype=torch.float32)

    def closure() -> Tensor:
        assert not flushed()
        optimizer.zero_grad()
        loss = likelihood.nll(y, net(x))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert not flushed() and len(inside) > 1 and all(inside)
    optimizer.pretrain_aux(1)
    assert not flushed() and all(inside)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_what_decays_ends_at_zero(backend: str) -> None:
    net, likelihood = nn.Sequential(nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 3)), GaussianLikelihood()
    with torch.no_grad():
        net[0].bias[:200] = -1e3  # units that never fire
    optimizer = FishLeg(net, likelihood=likelihood, backend=backend, anchor_every=1)
    x, y = randn(8, 4, dtype=torch.float32), randn(8, 3, dtype=torch.float32)
    for step in range(3):
        optimizer.zero_grad()
        likelihood.nll(y, net(x)).backward()
        if step == 2:
            optimizer.blocks[0].momentum[:200] = 1.2e-38  # the least number that is no denormal
            for moment in optimizer.blocks[0].moments.values():
                moment[:200, :2] = 1.2e-38
        optimizer.step()
    assert optimizer.blocks[0].momentum[:200].count_nonzero() == 0
    assert optimizer.blocks[0].moments["rows"][:200, :2].count_nonzero() == 0
