"""The compiled extension ``fishleg_fast._native`` (csrc/, C++ and CUDA), in thin Python.

The extension is optional, and needs neither torch nor a GPU to load. Importing this module asks CUDA nothing.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from ._version import __version__
from .availability import Availability

__all__ = ["available", "cuda_status", "extension", "features", "version"]

_REMEDY = "reinstall fishleg_fast (in a checkout: make clean setup)"
_BUILD_REASON = Path(__file__).with_name("_native_build.txt")  # left by setup.py where the build failed


def _load() -> tuple[ModuleType | None, str]:
    """The extension, or None and the reason with its remedy."""
    try:
        module = importlib.import_module("fishleg_fast._native")
    except ModuleNotFoundError as error:
        if error.name != "fishleg_fast._native":
            raise
        if _BUILD_REASON.exists():
            why = _BUILD_REASON.read_text(encoding="utf-8").strip()
            return None, f"the extension could not be built at installation: {why}; then {_REMEDY}"
        return None, f"the extension is not built for this Python: {_REMEDY}"
    except ImportError as error:  # built for another Python or C++ library
        return None, f"the extension does not load ({error}): {_REMEDY}"
    built = getattr(module, "__version__", None)
    if built != __version__:
        return None, f"the extension was built for fishleg_fast {built}, but this is {__version__}: {_REMEDY}"
    return module, ""


def extension() -> ModuleType:
    """The extension itself. ImportError, with the reason, where it is unavailable."""
    module, reason = _load()
    if module is None:
        raise ImportError(f"fishleg_fast's compiled extension is unavailable: {reason}")
    return module


def available() -> Availability:
    """Whether the extension can be used, and why not. A missing GPU is no reason: see `cuda_status`."""
    module, reason = _load()
    return Availability(module is not None, reason)


def version() -> str:
    """The version of fishleg_fast that the extension was built for."""
    return str(extension().__version__)


def features() -> dict[str, bool | str]:
    """What was compiled in: ``cuda`` (bool), ``compiler``, ``cuda_compiler`` (empty without CUDA)."""
    return dict(extension().features())


def cuda_status() -> Availability:
    """Whether the extension can use a CUDA device here, and what it found or why not.

    Asks the CUDA runtime, which initialises the driver in this process: call it on demand, not at import.
    """
    module, reason = _load()
    if module is None:
        return Availability(False, reason)
    ok, detail = module.cuda_status()
    return Availability(bool(ok), str(detail))
