"""The CUDA backend on a device; the tests are in cuda_cases*.py, as for the kernels on the CPU, and some more here.

Memory errors and races, which those on the CPU cannot show:

    compute-sanitizer --tool memcheck python -m pytest tests/backends/cuda -n 0 -m gpu
    compute-sanitizer --tool racecheck python -m pytest tests/backends/cuda -n 0 -m gpu -k "qv or theta or lambda"
"""

from __future__ import annotations

import pytest
import torch

from cuda_cases import *  # noqa: F403
from cuda_cases_lambda import *  # noqa: F403
from cuda_cases_polar import *  # noqa: F403
from fishleg_fast.backends import cuda
from fishleg_fast.backends.cuda import coverage, state
from fishleg_fast.backends.protocol import ThetaOptions
from support.blocks import everything
from support.cuda_blocks import TOLERANCE, layer, model, set_gradients
from support.dense import randn, relative

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_workspaces")]


@pytest.fixture
def device() -> torch.device:
    ok, reason = cuda.available(torch.device("cuda"), torch.float32) if torch.cuda.is_available() else (False, "no GPU")
    if not ok:
        pytest.skip(reason)
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32", "bf16"])
@pytest.mark.parametrize("shape", [(256, 256), (512, 785), (1000, 251), (64, 2000)])
def test_products_of_the_sizes_of_layers(device: torch.device, shape: tuple[int, int], precision: str) -> None:
    block = layer(device, *shape)
    block.structure.precision = precision
    u = randn(*shape).float().to(device)
    R, L = (block.structure.fishleg_aux[name].double() for name in "RL")
    assert relative(cuda.qv([block], [u])[0], R.T @ R @ u.double() @ L @ L.T) <= TOLERANCE[precision]


def test_a_captured_step_is_the_step(device: torch.device) -> None:
    """A CUDA graph of a θ step, replayed, against the same steps one by one."""
    graphed, eager = model(device, beta=0.8), model(device, beta=0.8)
    for b in [*graphed, *eager]:
        b.step = b.step.to(device)
    gs = set_gradients(graphed, 1)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        cuda.theta_step(graphed, gs, ThetaOptions(capturable=True))
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, ok = cuda.theta_step(graphed, gs, ThetaOptions(capturable=True))
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        cuda.theta_step(eager, set_gradients(eager, 1), ThetaOptions(capturable=True))
    assert ok
    for a, b in zip(everything(graphed), everything(eager), strict=True):
        assert relative(a, b) <= 1e-6


def test_a_capturable_step_does_not_wait_for_the_device(device: torch.device) -> None:
    blocks = model(device)
    for b in blocks:
        b.step, b.aux_step = b.step.to(device), b.aux_step.to(device)
    ours = [b for b in blocks if coverage.why_uncovered(state.facts_of(b)) is None]
    cuda.theta_step(ours, set_gradients(ours, 1), ThetaOptions(capturable=True))
    torch.cuda.set_sync_debug_mode("error")
    try:
        cuda.theta_step(ours, set_gradients(ours, 1), ThetaOptions(capturable=True))
    finally:
        torch.cuda.set_sync_debug_mode("default")
