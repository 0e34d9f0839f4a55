"""What every test has: torch's generator seeded, so that a failure repeats, whatever ran before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fishleg_fast.backends import registry

pytest.register_assert_rewrite("support")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=list(registry.BACKENDS), help="what backend=None takes: in tests, the best")


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a test file draws when it is imported does not depend on what others drew."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _preferred(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    name = request.config.getoption("--backend")
    if name is not None:
        first = registry.BACKENDS[name]._replace(kinds=None, checked=False)
        others = {other: row for other, row in registry.BACKENDS.items() if other != name}
        monkeypatch.setattr(registry, "BACKENDS", {name: first, **others})


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def no_grad() -> Iterator[None]:
    """As an optimizer calls its ops."""
    with torch.no_grad():
        yield


@pytest.fixture
def poisoned() -> Iterator[None]:
    """As an optimizer calls its ops, without gradients; and memory from torch.empty holds nothing but nan (or 255)."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan().all() and torch.empty(1, dtype=torch.uint8) == 255
        with torch.no_grad():
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "cpp"])
def each_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs with every backend for CPUs: with its ops as the test module's ``steps``."""
    _, ops = registry.choose(request.param, torch.device("cpu"), torch.float64)
    monkeypatch.setattr(request.module, "steps", ops)
    return request.param
