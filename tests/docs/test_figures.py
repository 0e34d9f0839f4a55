"""The figures on the front page, and of the best lr, are those of benchmarks/results/convergence.md."""

from __future__ import annotations

import re

import pytest

from docs.pages import DOCS, ROOT

PROBLEMS = {  # column of the pages -> heading of the results
    "GPT": "GPT on Python's help texts, batch 16",
    "ResNet18": "ResNet18 on digits, batch 128",
    "CURVES, batch 1000": "CURVES autoencoder, batch 1000",
    "CURVES, batch 100": "CURVES autoencoder, batch 100",
    "wide MLP": "wide MLP on Python's help texts, batch 256",
}
RESULTS = (ROOT / "benchmarks/results/convergence.md").read_text(encoding="utf-8")


def cells(line: str) -> list[str]:
    return [cell.strip().strip("*") for cell in line.strip().strip("|").split("|")]


def found(heading: str) -> dict[str, dict[str, str]]:
    """The first table under a heading of the results: optimizer -> column -> text."""
    section = RESULTS.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [cells(line) for line in re.search(r"(^\|.*\n)+", section, re.MULTILINE)[0].splitlines()]  # type: ignore[index]
    return {row[0]: dict(zip(rows[0], row, strict=False)) for row in rows[2:]}


def table(page: str, heading: str, number: int = 0) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a page's table."""
    text = (DOCS / page).read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    head, _, *rows = [m[0].splitlines() for m in re.finditer(r"(^\|.*\n)+", text, re.MULTILINE)][number]
    return cells(head), [cells(row) for row in rows]


def last_place(number: str) -> float:
    """One unit in it."""
    digits, _, exponent = number.partition("e")
    return 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))


@pytest.mark.parametrize(
    ("page", "heading", "number", "column"),
    [
        ("index.md", "Results", 0, "mean"),
        ("settings.md", "lr", 0, "lr"),
    ],
)
def test_figures_are_those_of_the_results(page: str, heading: str, number: int, column: str) -> None:
    head, rows = table(page, heading, number)
    compared = 0
    for name in head[1:]:
        problem = max((p for p in PROBLEMS if name.startswith(p)), key=len)
        results = found(PROBLEMS[problem])
        for row in rows:
            said = row[head.index(name)]
            if not said:
                continue
            result = float(results[row[0].partition(",")[0]][column])
            assert abs(result - float(said)) <= 0.501 * last_place(said), (page, row[0], name)
            compared += 1
    assert compared >= 12


def test_seconds_a_step_are_those_of_the_results() -> None:
    results = ROOT / "benchmarks/results"
    section = (DOCS / "settings.md").read_text(encoding="utf-8").partition("\n### Seconds a step\n")[2]
    rows = [cells(line) for line in re.search(r"(^\|.*\n)+", section, re.MULTILINE)[0].splitlines()[2:]]  # type: ignore[index]
    assert len(rows) == 8
    file = heading = ""
    for problem, *figures, source in rows:
        file = source.split("`")[1] if "`" in source else file
        heading = heading if problem.startswith("the same") else PROBLEMS.get(problem, problem)
        precision = "medium" if "medium" in problem else "highest"
        section = (results / file).read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
        found = [cells(line) for line in section.splitlines() if line.startswith("|")]
        measured = []
        for name, said in zip(("AdamW", "FishLeg"), figures, strict=False):
            row = next(
                row
                for row in found
                if re.fullmatch(rf'{name}(, \d+ steps, lr [\d.]+|, fused|, precision="{precision}")?', row[0])
            )
            column = {"wallclock.md": -1, "step_time.md": 1}[file]
            assert float(said) == float(row[column]), (problem, name)
            measured.append(float(said))
        times = float(row[2].partition("×")[0]) if column == 1 else measured[1] / measured[0]
        assert float(figures[2]) == pytest.approx(times, abs=0.051), problem


def test_multiples_of_the_best_lr_are_those_of_the_results() -> None:
    head, rows = table("settings.md", "lr", 1)
    compared = 0
    for row in rows:
        problem = max((p for p in PROBLEMS if row[0].startswith(p)), key=len)
        section = (
            RESULTS.partition(f"## {PROBLEMS[problem]}\n")[2]
            .partition("Other learning rates")[2]
            .partition("\nTuning")[0]
        )
        known = {
            cells(line)[1]: float(cells(line)[-1])
            for line in section.splitlines()
            if line.startswith("|") and cells(line)[0] == "FishLeg"
        }
        for name, said in zip(head[1:], row[1:], strict=True):
            ratio = known["0.33" if name == "1/3" else name]
            assert abs(ratio - float(said)) <= 0.501 * last_place(said), (row[0], name)
            compared += 1
    assert compared == 16


def test_the_plan_is_what_is_printed() -> None:
    from fishleg_fast.sharded.plan import plan, transformer_7b

    assert f"```text\n{plan(transformer_7b(), 8)}\n```" in (DOCS / "several_gpus.md").read_text(encoding="utf-8")


def test_times_and_ranks_are_those_of_the_results() -> None:
    _, rows = table("cpu.md", "What a step costs")
    times = (
        (ROOT / "benchmarks/results/step_time.md").read_text(encoding="utf-8").partition("## 784-1000-500-250-30")[2]
    )
    measured = [cells(line) for line in re.search(r"(^\|.*\n)+", times, re.MULTILINE)[0].splitlines()[2:]]  # type: ignore[index]
    for row, result in zip(rows, measured, strict=True):
        assert float(row[1]) == pytest.approx(float(result[1]), abs=0.06), row
        assert float(row[2]) == pytest.approx(float(result[2].partition("×")[0]), abs=0.06), row
    _, rows = table("several_gpus.md", "What was measured")
    several = (ROOT / "benchmarks/results/several_ranks.md").read_text(encoding="utf-8")
    measured = [cells(line) for line in re.search(r"(^\|.*\n)+", several, re.MULTILINE)[0].splitlines()[2:]]  # type: ignore[index]
    for row, result in zip(rows, measured, strict=True):
        assert row[1] == result[3] and float(row[4]) == pytest.approx(float(result[7]), abs=0.051), row
        assert [float(x) for x in row[2:4]] == [float(x) for x in result[5:7]], row
