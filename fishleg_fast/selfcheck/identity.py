"""What a verdict or a table of times is about: the device, its driver, and the versions of everything that ran."""

from __future__ import annotations

import hashlib
import platform
import re
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from .. import native
from .._version import __version__

_PACKAGE = Path(__file__).resolve().parents[1]
_SOURCES = ("kernels", "backends", "algebra", "selfcheck")
_DRIVER = Path("/proc/driver/nvidia/version")


def identity(device: torch.device) -> dict[str, str]:
    """Device, driver, torch, Triton, our version, and a digest of the kernels' sources and of the extension."""
    cuda = device.type == "cuda"
    return {
        "device": _device_name(device),
        "driver": _driver() if cuda else "",
        "torch": str(torch.__version__),
        "triton": triton_version(),
        "fishleg_fast": __version__,
        "kernels": kernels_digest(),
    }


def triton_version() -> str:
    """Read, not imported: a broken Triton breaks nothing here."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "not installed"


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device.type} ({platform.machine()})"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, capability {major}.{minor}"


def _driver() -> str:
    """The driver's version where Linux tells it, and that of CUDA which it supports."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", _DRIVER.read_text(encoding="utf-8"))
    except OSError:
        found = None
    supported = vars(torch._C)["_cuda_getDriverVersion"]()  # only builds with CUDA have it
    return f"{found.group() if found else 'unknown'}, CUDA {supported}"


@cache
def kernels_digest() -> str:
    """Of every source that kernels are launched from, and of the extension; read once in a process."""
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((_PACKAGE / folder).rglob("*.py")):
            digest.update(path.relative_to(_PACKAGE).as_posix().encode() + path.read_bytes())
    if native.available().supported:
        file = native.extension().__file__
        digest.update(Path(file).read_bytes() if file else b"")
    return digest.hexdigest()[:16]
