"""The CUDA backend with its kernels compiled for the CPU; the tests are in cuda_cases.py."""

from __future__ import annotations

import pytest
import torch
from cuda_cases import *  # noqa: F403
from cuda_cases import _poisoned  # noqa: F401
from cuda_emulation import emulated

from fishleg_fast import cuda_plans


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(cuda_plans, "_machine", cuda_plans.Machine(emulated(), "cpu", lambda device: 0))
    return torch.device("cpu")
