"""OUT/gpu.json, written anew after every measurement, and the loop that fills it."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEVICE_LOST = 75  # a worker's exit status: the device is lost to its process, and another one should go on


@dataclass(frozen=True)
class Task:
    """One measurement. ``needs``: seconds that should be left for it to be started."""

    key: str
    run: Callable[[], dict[str, Any]]
    needs: float = 3.0


def describe(error: BaseException) -> str:
    """An error's type and text, and those of the one that it came out of; not too much of them."""
    text = f"{type(error).__name__}: {error}".strip()
    text = text if len(text) <= 600 else text[:600] + " ..."
    before = error.__cause__ or error.__context__
    return text if before is None else f"{text} (after {describe(before)})"


def json_safe(x: Any) -> Any:
    """For JSON, which has no inf or nan: None."""
    if isinstance(x, dict):
        return {str(k): json_safe(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [json_safe(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


class ResultsFile:
    """The results, and their file. A kill at any moment leaves the file whole: it is replaced, never written to."""

    def __init__(self, path: Path, render: Callable[[dict[str, Any]], str] | None = None) -> None:
        self.path, self.render = path, render
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"results": {}}

    @property
    def results(self) -> dict[str, Any]:
        """key -> what was found."""
        return self.data["results"]

    def save(self) -> None:
        """Write the file; and the tables beside it where there is something to render them."""
        self._replace(self.path, json.dumps(json_safe(self.data), indent=1, ensure_ascii=False) + "\n")
        if self.render is not None:
            self._replace(self.path.with_suffix(".txt"), self.render(self.data))

    @staticmethod
    def _replace(path: Path, text: str) -> None:
        part = path.with_name(path.name + ".part")
        part.write_text(text)
        os.replace(part, path)


def work(
    file: ResultsFile, tasks: Sequence[Task], deadline: float, healthy: Callable[[], bool], clear: Callable[[], None]
) -> int:
    """Run what has no result yet, as long as there is time (``deadline`` is of time.time()). An exit status.

    A task that fails leaves {"error": its text}; the next ones go on, in another process where the device is lost.
    """
    file.data["unmeasured"] = [t.key for t in tasks if t.key not in file.results]
    for task in tasks:
        if task.key in file.results:
            continue
        if time.time() + task.needs > deadline:
            continue  # a shorter one may still fit
        file.data["running"] = task.key
        file.save()
        start = time.time()
        try:
            result = task.run()
        except Exception as error:
            result = {"error": describe(error)}
        file.results[task.key] = result | {"seconds": round(time.time() - start, 2)}
        file.data["running"] = None
        file.data["unmeasured"].remove(task.key)
        file.save()
        if "error" in result and not healthy():
            return DEVICE_LOST
        clear()
    file.save()
    return 0
