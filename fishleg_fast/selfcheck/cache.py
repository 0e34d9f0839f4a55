"""The user's cache folder: what was found on a device, for the next process. One JSON file a key.

``FISHLEG_FAST_CACHE`` is another folder, or "off": nothing is read or written. A file is written whole or not at all,
and one that cannot be read, or is about something else, counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

VARIABLE = "FISHLEG_FAST_CACHE"
Value = TypeVar("Value")

_log = logging.getLogger("fishleg_fast")


def folder() -> Path | None:
    """Where files are kept by the platform's convention; None where the cache is off, or the user has no home."""
    chosen = os.environ.get(VARIABLE)
    try:
        if chosen:
            return None if chosen == "off" else Path(chosen).expanduser()
        home = Path.home()
    except RuntimeError as error:  # "~name/..." of no user, or nobody's
        _log.warning("there is no cache (%s): %s=<a folder> names one, or 'off'", error, VARIABLE)
        return None
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData/Local")
    elif sys.platform == "darwin":
        base = home / "Library/Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
        base = base if base.is_absolute() else home / ".cache"  # as the XDG specification has it
    return base / "fishleg_fast"


def path_of(kind: str, key: Mapping[str, Any]) -> Path | None:
    """The file of a key."""
    where, text = folder(), json.dumps(key, sort_keys=True)
    return where and where / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def load(kind: str, key: Mapping[str, Any], parse: Callable[[Any], Value]) -> Value | None:
    """What ``parse`` makes of what was saved; None where there is nothing, or nothing that it understands."""
    path = path_of(kind, key)
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["key"] != json.loads(json.dumps(key)):
            raise ValueError("it is about something else")
        return parse(found["value"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _log.warning("%s is ignored, and made anew: %s: %s", path, type(error).__name__, error)
        return None


def save(kind: str, key: Mapping[str, Any], value: Any) -> Path | None:
    """Where it was written to; None where it could not be, of which a line is logged, or the cache is off."""
    path, temporary = path_of(kind, key), None
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"key": key, "value": value}, file, indent=1)
        os.replace(temporary, path)  # whole, whoever else reads or writes it
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        _log.warning("%s cannot be written (%s): %s=<a folder> names another cache, or 'off'", path, error, VARIABLE)
        return None
    return path
