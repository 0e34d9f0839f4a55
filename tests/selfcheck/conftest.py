"""A device that is no GPU but is taken for one: the CPU, with ops of ``support.faulty_ops`` in the kernels' place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fishleg_fast.backends import registry
from fishleg_fast.backends.registry import Availability, Backend
from fishleg_fast.selfcheck import cache, dispatch, examination
from fishleg_fast.selfcheck.tuning import table
from fishleg_fast.selfcheck.verdict import Finding

Faults = dict[tuple[str, str], str]


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The cache's, not there yet."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "deep" / "cache"))
    return tmp_path / "deep" / "cache"


@pytest.fixture
def new_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function after which nothing is known but what the cache holds."""

    def forget() -> None:
        for module, name in ((dispatch, "_known"), (table, "_known"), (table, "_in_use")):
            monkeypatch.setattr(module, name, {})
        monkeypatch.setattr(registry, "_told", set())

    forget()
    return forget


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, folder: Path, new_process: Callable[[], None]) -> Callable[..., None]:
    """A function that puts a GPU here, with backends of those names whose ops are ``support.faulty_ops:NAME``."""

    def put(**names: str) -> None:
        rows = {
            name: Backend(
                lambda device=None, dtype=None: Availability(dtype != torch.float64, "as if"),
                f"support.faulty_ops:{ops}", ("cpu",), checked=True,
            )
            for name, ops in names.items()
        }  # fmt: skip
        monkeypatch.setattr(registry, "BACKENDS", {**rows, "reference": registry.BACKENDS["reference"]})
        monkeypatch.setitem(examination.SCALES, "cpu", "least")

    return put


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[tuple[str, ...]], Faults]]:
    """In the place of a child process: (the precisions that were checked, with the backends; faults to be found)."""
    asked: list[tuple[str, ...]] = []
    faults: Faults = {}

    def family(self: examination.Examination, backend: str, family: str, precision: str) -> Finding:
        fault = faults.get((backend, family))
        return Finding(backend, family, precision, {"odd": 1e-3}, {"odd": 1e-3}, 1e-2, fault)

    def together(self: examination.Examination, choice: object, precision: str) -> Finding:
        return Finding("together", "together", precision, {"odd": 1e-3}, {}, 1e-2, faults.get(("together", "together")))

    real = examination.Examination.findings

    def findings(self: examination.Examination, precision: str) -> Iterator[Finding]:
        asked.append((precision, *self.subject.backends))
        return real(self, precision)

    monkeypatch.setattr(examination.Examination, "family", family)
    monkeypatch.setattr(examination.Examination, "together", together)
    monkeypatch.setattr(examination.Examination, "findings", findings)
    yield asked, faults
