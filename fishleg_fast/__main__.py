"""``python -m fishleg_fast``: versions, and each backend with the reason if it cannot be used here."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from . import native
from ._version import __version__
from .backends import registry


def _triton_version() -> str:
    try:
        return metadata.version("triton")  # read, not imported: a broken Triton must not break this report
    except metadata.PackageNotFoundError:
        return "not installed"


def _extension_version() -> str:
    found = native.available()
    if not found.supported:
        return f"unavailable: {found.reason}"
    features = native.features()
    compilers = ", ".join(str(features[key]) for key in ("compiler", "cuda_compiler") if features[key])
    return f"{native.version()} ({compilers})"


def report() -> str:
    """The text that ``python -m fishleg_fast`` prints."""
    rows = [
        ("fishleg_fast", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", _triton_version()),
        ("extension", _extension_version()),
    ]
    if native.available().supported:
        rows.append(("its CUDA", native.cuda_status().reason))
    backend_rows = [
        (name, ("available" if found.supported else "unavailable") + (f": {found.reason}" if found.reason else ""))
        for name, found in registry.report()
    ]
    width = max(len(name) for name, _ in rows + backend_rows)
    lines = [f"{name:<{width}}  {text}" for name, text in rows]
    lines += ["", "backends", *(f"{name:<{width}}  {text}" for name, text in backend_rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
