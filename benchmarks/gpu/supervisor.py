"""Runs the measuring processes: one after another, where one dies or hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from benchmarks.common.paths import ROOT
from benchmarks.gpu.results_file import DEVICE_LOST, ResultsFile

GRACE = 15.0  # seconds that the last measurement may take beyond the budget
RESTARTS = 25


def supervise(worker: list[str], path: Path, deadline: float, environment: dict[str, str], hangs: float) -> list[str]:
    """Run worker processes until one ends well or the time is up; what went wrong on the way.

    The measurement during which a worker died or hung gets that as its error, and the next worker goes on after it.
    """
    troubles: list[str] = []
    while len(troubles) <= RESTARTS:
        process = subprocess.Popen(worker, cwd=ROOT, env=environment, start_new_session=True)
        started, why = time.time(), ""
        before = len(ResultsFile(path).results)
        try:
            while process.poll() is None:
                time.sleep(0.1)
                last = max(started, path.stat().st_mtime)
                late = time.time() > deadline + GRACE
                if late or time.time() - last > hangs:
                    why = "killed when the time was up" if late else f"hung: killed after {hangs:.0f} s"
                    break
        finally:  # also where this process is told to end
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        status = process.returncode
        if status == 0:
            return troubles
        if not why:
            name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            why = "the device was lost" if status == DEVICE_LOST else f"the process died: {name}"
        file = ResultsFile(path)
        running = file.data.get("running")
        if running is not None:
            file.results.setdefault(running, {"error": why})
            file.data["running"] = None
        elif len(file.results) == before:
            troubles.append(f"{why}, before it measured anything")
            file.data["troubles"] = troubles
            file.save()
            return troubles
        troubles.append(f"{why}, at {running or 'the last one measured'}")
        file.data["troubles"] = troubles
        file.save()
        if time.time() > deadline:
            return troubles
    return troubles
