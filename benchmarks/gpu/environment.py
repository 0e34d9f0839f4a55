"""The device, its driver and the versions; which backends can run on it; and a repair of Triton's interpreter."""

from __future__ import annotations

import platform
import subprocess
from typing import Any

import torch

from benchmarks.gpu.results_file import describe
from fishleg_fast import __version__
from fishleg_fast.backends import registry


def usable_backends(device: torch.device) -> dict[str, tuple[bool, str]]:
    """Backend -> whether it can run on the device, and why not; a backend that breaks when asked cannot."""
    found = {}
    for name in registry.BACKENDS:
        try:
            found[name] = registry.available(name, device, torch.float32)
        except Exception as error:
            found[name] = (False, f"it broke when asked: {describe(error)}")
    return found


def record(device: torch.device) -> dict[str, Any]:
    """Device, driver and versions, and every backend with the reason where it cannot be used."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "missing"
    found = {
        "device": "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "fishleg_fast": __version__,
        "system": platform.platform(),
        "backends": {name: {"available": ok, "why": why} for name, (ok, why) in usable_backends(device).items()},
    }
    if device.type != "cuda":
        return found
    properties = torch.cuda.get_device_properties(device)
    try:
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20,
        ).stdout.split("\n")[0]  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        driver = "unknown: nvidia-smi does not answer"
    return found | {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "L2": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "driver": driver,
    }


def repair_interpreter() -> None:
    """For a rehearsal: Triton 3.6's interpreter asks NumPy for int(array of one element), which 2.4 refuses."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
