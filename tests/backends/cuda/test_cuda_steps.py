"""The CUDA backend with its kernels compiled for the CPU; the tests are in cuda_cases*.py."""

from __future__ import annotations

import pytest
import torch

from cuda_cases import *  # noqa: F403
from cuda_cases_lambda import *  # noqa: F403
from cuda_cases_lambda import aux_inputs
from cuda_cases_polar import *  # noqa: F403
from fishleg_fast.backends import cuda
from fishleg_fast.backends.cuda import runtime
from fishleg_fast.backends.protocol import LambdaOptions, ThetaOptions
from support.cuda_blocks import layer, set_gradients
from support.cuda_emulation import emulated

pytestmark = pytest.mark.usefixtures("poisoned_workspaces")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(runtime, "_runtime", runtime.Runtime(emulated(), "cpu", lambda device: 0))
    return torch.device("cpu")


@pytest.mark.parametrize("count", [2, 24])
def test_the_number_of_launches_does_not_depend_on_the_number_of_blocks(device: torch.device, count: int) -> None:
    """As long as a launch's table holds them all, which is about 200 parameters."""
    small = [layer(device, 4 + i % 3, 5, seed=i) for i in range(count)]
    large = [layer(device, 2, 257 + i, seed=i) for i in range(2)]

    def launches(op) -> int:
        before = emulated().launches()
        op()
        return emulated().launches() - before

    def theta(blocks, **options: object) -> int:
        gs = set_gradients(blocks, 1)
        return launches(lambda: cuda.theta_step(blocks, gs, ThetaOptions(**options)))

    both = [*small, *large]
    assert launches(lambda: cuda.refresh(both)) == 1
    assert launches(lambda: cuda.refresh(both)) == 0
    assert theta(small) == 4  # prepare, chain, decision, update
    assert theta(both) == 6  # and two products
    assert theta(both, momentum="after") == 7  # and what nat is then
    assert theta(both, normalize="spectral") == 6 + 20  # nat/‖nat‖, six steps of 3 products, what the first divides by
    assert theta(both, normalize="spectral", momentum="after") == 7 + 20
    assert launches(lambda: cuda.qv(both, set_gradients(both, 1))) == 4
    arguments = aux_inputs(both, cuda, 1)
    step = {"damping": 0.1, "lr": 1e-3}
    assert launches(lambda: cuda.lambda_step(both, *arguments, LambdaOptions(**step))) == 8
    assert (
        launches(lambda: cuda.lambda_step(both, *arguments, LambdaOptions(**step, precondition=True))) == 8 + 2 + 1
    )  # and P and S
    us = set_gradients(both, 1)
    assert launches(lambda: cuda.inner(us, us)) == 2
