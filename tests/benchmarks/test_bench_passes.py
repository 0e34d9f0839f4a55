"""Passes and host work are measured end to end on small problems.

Nothing here is about how long anything takes.
"""

import json

import pytest

from fishleg_fast.backends import cpu

pytest.importorskip("tqdm")

from benchmarks.common import models
from benchmarks.cpu import passes


@pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])
def test_passes_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "MNIST_WIDTHS", (500, 400, 4))  # large enough for low-rank gradients
    out = tmp_path / "new" / "passes.json"
    assert passes.main(["--rounds", "2", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert list(record["passes"]) == ["highest", "medium"] and list(record["host"]) == list(passes.LAYERS)
    for figures in [*record["passes"].values(), *record["host"].values()]:
        assert all(figure["median"] > 0 for figure in figures.values())
    text = out.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out and "python -m benchmarks.cpu.passes --rounds 2" in text
    assert str(tmp_path) not in text
