"""Where steps are decided on the device, as on a GPU by default: what is told all the same, and at what precision."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fishleg_fast import FishLeg, GaussianLikelihood
from fishleg_fast.fisher import layer_check
from fishleg_fast.precision import own_precision

LIKELIHOOD = GaussianLikelihood()


def make(**given) -> FishLeg:
    """As an optimizer is on a GPU without capturable: not waiting, but for steps that learn."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    settings = {"update_aux_every": 5, "anchor_every": 10, **given}
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, capturable=True, **settings)
    optimizer.settings = replace(optimizer.settings, capturable=False)
    assert optimizer.settings.on_device
    return optimizer


def train(optimizer: FishLeg, steps: int, spoilt: tuple[int, ...] = ()) -> list[str]:
    """What was warned of at which step: "step: message"."""
    told = []
    for k in range(steps):
        optimizer.zero_grad()
        LIKELIHOOD.nll(torch.randn(8, 3), optimizer.model(torch.randn(8, 4))).backward()
        if k in spoilt:
            optimizer.model[0].weight.grad[0, 0] = float("nan")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        told += [f"{k}: {w.message}" for w in caught]
    return told


def test_the_first_skipped_step_is_told_of_once_where_the_host_waits_anyway() -> None:
    optimizer = make()
    (told,) = train(optimizer, 21, spoilt=(2, 3, 11))
    assert told.startswith("5: FishLeg skipped a step: the gradient or the natural gradient was not finite")
    assert optimizer.diagnostics()["skipped_steps"] == 3 and optimizer.diagnostics()["steps"] == 21
    assert all(torch.isfinite(p).all() for p in optimizer.model.parameters())


def test_steps_that_are_taken_are_not_told_of() -> None:
    optimizer = make()
    assert train(optimizer, 12) == [] and optimizer.diagnostics()["skipped_steps"] == 0


def test_a_spoilt_lambda_is_refused_where_the_host_waits() -> None:
    optimizer = make(anchor_every=0)  # anchoring would make a new one
    train(optimizer, 6)
    optimizer.blocks[1].structure.fishleg_aux["R"].fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"λ of '2', .* is not finite"):
        train(optimizer, 6)


def test_counters_go_on_after_a_checkpoint_and_are_not_told_of_again() -> None:
    optimizer = make()
    train(optimizer, 7, spoilt=(2,))
    saved = optimizer.state_dict()
    other = make()
    other.model.load_state_dict(optimizer.model.state_dict())
    other.load_state_dict(saved)
    assert other.diagnostics()["skipped_steps"] == 1
    assert train(other, 7, spoilt=(1,)) == [] and other.diagnostics()["skipped_steps"] == 2


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("asked", "device", "users", "want"),
    [
        (None, CUDA, "highest", "high"),
        (None, CUDA, "high", None),
        (None, CUDA, "medium", None),
        ("highest", CUDA, "highest", "highest"),
        ("tf32x3", CUDA, "highest", "tf32x3"),
        ("medium", CUDA, "high", "medium"),
        (None, CPU, "highest", None),
        (None, torch.device("mps"), "highest", None),
        ("high", CPU, "highest", "high"),
    ],
)
def test_products_are_tf32_on_cuda_where_nobody_says_otherwise(
    asked: str | None, device: torch.device, users: str, want: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(users)
    try:
        assert own_precision(asked, device) == want
    finally:
        torch.set_float32_matmul_precision(before)


def test_devices_of_other_makers_follow_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert own_precision(None, CUDA) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["reference", None])
def test_an_ordinary_step_does_not_wait(backend: str | None) -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5)).cuda()
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, backend=backend)

    def step() -> None:
        optimizer.zero_grad()
        batch: Tensor = torch.randn(8, 4, device="cuda")
        LIKELIHOOD.nll(torch.randn(8, 5, device="cuda"), net(batch)).backward()
        optimizer.step()

    for _ in range(3):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class NoFloat64(TorchDispatchMode):
    """A device that has no float64, as Apple's GPUs; single values may go to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for t in tree_leaves(found):
            assert not (isinstance(t, Tensor) and t.dtype == torch.float64), f"{func} makes float64"
        return found


@pytest.mark.parametrize("fisher", ["ggn", "hessian", "antithetic", "rank1"])
@pytest.mark.parametrize("anchor_from", ["drawn", "training"])
def test_a_device_without_float64_will_do(fisher: str, anchor_from: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("fishleg_fast.") and hasattr(module, "widest"):
            monkeypatch.setattr(module, "widest", lambda device: torch.float32)
    monkeypatch.setattr(layer_check.LayerCheck, "note", lambda self: None)  # of figures that are on the host
    optimizer = make(backend="reference", fisher=fisher, anchor_from=anchor_from)
    with NoFloat64():
        assert train(optimizer, 21) == []
