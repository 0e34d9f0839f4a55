"""The page of evidence is what its records say, and the README's figures are those."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("torch")

from benchmarks.common.paths import RESULTS, ROOT
from benchmarks.study import evidence

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_page_is_what_the_records_make(tmp_path: Path) -> None:
    for name in ("convergence.jsonl", "wallclock.jsonl", "state_memory.json"):
        shutil.copy(RESULTS / name, tmp_path)
    assert evidence.write(tmp_path) == (RESULTS / "README.md").read_text(encoding="utf-8")


def _cells(line: str) -> list[str]:
    return [cell.strip().strip("*") for cell in line.strip().strip("|").split("|")]


def _rows(text: str) -> list[list[str]]:
    return [_cells(line) for line in re.search(r"(^\|.*\n)+", text, re.MULTILINE)[0].splitlines()]  # type: ignore[index]


TITLES = {
    "GPT": "GPT on Python's help texts, batch 16",
    "ResNet18": "ResNet18 on digits, batch 128",
    "CURVES, batch 1000": "CURVES autoencoder, batch 1000",
    "CURVES, batch 100,": "CURVES autoencoder, batch 100",
    "wide MLP": "wide MLP on Python's help texts, batch 256",
}


@pytest.mark.parametrize("problem", TITLES)
def test_losses_of_the_readme(problem: str) -> None:
    page = (RESULTS / "README.md").read_text(encoding="utf-8").partition(f"## {TITLES[problem]}\n")[2]
    measured = {row[0]: float(row[1].partition(" ")[0]) for row in _rows(page)[2:]}
    head, _, *rows = _rows(README.partition("## When to use it, and when not")[2])
    column = next(k for k, title in enumerate(head) if title.startswith(problem))
    assert {row[0] for row in rows} == set(measured)
    for row in rows:
        digits, _, exponent = row[column].partition("e")
        place = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
        assert float(row[column]) == pytest.approx(measured[row[0]], abs=0.51 * place + 1e-12), row
    best = min(rows, key=lambda row: float(row[column]))[0]
    assert f"| {best} |" in README and best == min(measured, key=measured.__getitem__)


def test_seconds_of_the_readme() -> None:
    places = ("of its seconds on the autoencoder", "on the GPT", "on the ResNet", "on the wide MLP")
    said = re.search(", ".join(rf"([\d.]+) {place}" for place in places), README)
    resnet = re.search(r"takes ([\d.]+) times AdamW's seconds, and ([\d.]+) times Muon's, to where those end", README)
    page = (RESULTS / "wallclock.md").read_text(encoding="utf-8")

    def ratio(title: str, rival: str) -> float:
        rows = _rows(page.partition(f"## {title}\n")[2])
        return float(next(row[-1] for row in rows if f": to {rival}," in row[0]))

    titles = [TITLES[name] for name in ("CURVES, batch 1000", "GPT", "ResNet18", "wide MLP")]
    for text, title in zip(said.groups(), titles, strict=True):  # type: ignore[union-attr]
        assert float(text) == pytest.approx(ratio(title, "Muon"), abs=0.51 * 10.0 ** -len(text.partition(".")[2]))
    for text, rival in zip(resnet.groups(), ("AdamW", "Muon"), strict=True):  # type: ignore[union-attr]
        assert float(text) == pytest.approx(ratio(TITLES["ResNet18"], rival), abs=0.051)


def test_memory_of_the_readme() -> None:
    import json

    found: dict[str, list[float]] = {}
    for record in json.loads((RESULTS / "state_memory.json").read_text()):
        found.setdefault(record["optimizer"], []).append(record["per parameter byte"])
    low, high, adamw, soap_low, soap_high = map(
        int,
        re.search(  # type: ignore[union-attr]
            r"keeps (\d+) to (\d+) times the parameters' bytes on a CPU, AdamW (\d+), SOAP (\d+) to (\d+)", README
        ).groups(),
    )
    assert (low, high) == (round(min(found["fishleg"])), round(max(found["fishleg"])))
    assert (soap_low, soap_high) == (round(min(found["soap"])), round(max(found["soap"])))
    assert all(round(x) == adamw for x in found["adamw"])
