"""A child process that answers, or is found to hang or to have died."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import spawn
from typing import Any

START_SECONDS = 120.0  # to import torch and make a context on the device, on a busy machine
ANSWER_SECONDS = 120.0  # for one family, its kernels' first compilation included

_CODE = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; "  # the working folder may have a json.py
    "import json; request = json.loads(sys.stdin.readline()); sys.path[:] = request['path']; "
    "from fishleg_fast.selfcheck.child import main; main(request)"
)


class CannotStart(Exception):
    """There is no child process, or it cannot use the device; the text says why."""


class NoAnswer(Exception):
    """The child hangs, or has died of what it was asked; the text says how."""


class Conversation:
    """Lines of JSON to and from a child. A context: the child ends with it, whatever it is at."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        """CannotStart where no child says within START_SECONDS that it can use the device."""
        python = spawn.get_executable()  # which embedding programs set by multiprocessing.set_executable
        if not python or getattr(sys, "frozen", False):
            raise CannotStart("this program is not run by a Python interpreter that could be started again")
        self._errors = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                [os.fsdecode(python), "-c", _CODE],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, encoding="utf-8",
            )  # fmt: skip
        except OSError as error:
            self._errors.close()
            raise CannotStart(f"{os.fsdecode(python)} cannot be started: {error}") from error
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout, self.over = self._process.stdin, self._process.stdout, False
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            first = self._asked({**request, "path": [p for p in sys.path if isinstance(p, str)]}, START_SECONDS)
        except NoAnswer as error:
            self.end()
            raise CannotStart(f"the process {error}") from error
        if "ready" not in first:
            self.end()
            raise CannotStart(first.get("unusable", "the process answers as another program"))

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def ask(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """The child's answer. NoAnswer where it hangs or dies; the conversation is ``over`` then."""
        try:
            answer = self._asked(item, ANSWER_SECONDS)
        except NoAnswer:
            self.end()
            raise
        if answer.pop("spoilt", False):  # its device's context
            self.end()
        return answer

    def end(self) -> None:
        """Kill the child."""
        self.over = True
        self._process.kill()
        with suppress(OSError):  # of what it did not read
            self._stdin.close()
        with suppress(subprocess.TimeoutExpired):  # a kernel that hangs may keep it until the driver gives up
            self._process.wait(10)
        self._errors.close()

    def _listen(self) -> None:
        with self._stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def _asked(self, item: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        try:
            self._stdin.write(json.dumps(item) + "\n")
            self._stdin.flush()
        except OSError as error:
            raise NoAnswer(self._death()) from error
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise NoAnswer(f"gave no answer within {seconds:g} s") from None
        if line is None:
            raise NoAnswer(self._death())
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        return found if isinstance(found, dict) else {"fault": f"answered what is no answer: {line[:100]!r}"}

    def _death(self) -> str:
        """How the child died, and the end of what it said."""
        try:
            status = self._process.wait(10)
        except subprocess.TimeoutExpired:
            return "closed its output and goes on"
        self._errors.seek(0)
        said = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        how = f"died of {_signal(-status)}" if status < 0 else f"ended with status {status}"
        return how + (f": {said[-1][:200]}" if said else "")


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
