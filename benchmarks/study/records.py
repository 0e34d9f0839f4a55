"""Records of runs: a line of JSON each, and what makes two of them the same run."""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path
from typing import Any

from benchmarks.common.optimizers import FROM_PYTORCH_OPTIMIZER

Key = tuple[str, str, int, float, int]  # problem, optimizer, steps, lr, seed


def key(record: dict[str, Any]) -> Key:
    """What makes two records the same run; lr to six digits, so that 0.015/3 is 0.005."""
    return record["problem"], record["optimizer"], record["steps"], float(f"{record['lr']:.6g}"), record["seed"]


def read(path: Path) -> dict[Key, dict[str, Any]]:
    """The records of a results file; of two with the same key the later one counts."""
    if not path.exists():
        return {}
    records: dict[Key, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            records[key(record)] = record
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise SystemExit(f"{path}, line {number} is not a record of a run ({error}). Delete that line.") from error
    return records


def append(record: dict[str, Any], path: Path) -> None:
    """One more record, in one write in append mode: several processes may share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record, default=str, ensure_ascii=False) + "\n")


def finite(value: float) -> float | None:
    """A number that JSON can hold: six digits, and None for what is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def versions(optimizer: str) -> dict[str, str]:
    """Versions of what decides a run's figures."""
    from importlib.metadata import version

    found = {"python": platform.python_version()}
    for name in ["torch", "numpy"] + ["pytorch_optimizer"] * (optimizer in FROM_PYTORCH_OPTIMIZER):
        found[name] = version(name)
    if optimizer.startswith("fishleg"):  # from the code that ran: a checkout need not be the installed one
        from fishleg_fast import __version__

        found["fishleg_fast"] = __version__
    return found
