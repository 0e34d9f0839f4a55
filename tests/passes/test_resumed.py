"""What earlier passes have taught about a model is in a checkpoint: from there on training is bit for bit the same."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fishleg_fast import FishLeg, GaussianLikelihood
from support.dense import randn

STEPS, SAVED = 16, (4, 7, 9, 12)


class NoForward(torch.autograd.Function):
    """tanh, with two derivatives but none forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * (1 - torch.tanh(x) ** 2)


class Net(nn.Module):
    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.call = nn.Linear(6, 8), nn.Linear(8, 3), call

    def forward(self, *args: Any) -> Tensor:
        return self.call(self.a, self.b, *args)


def rows(k: int) -> int:
    """Of the batch of a step: another size now and then, so that one of a checkpoint is followed by either."""
    return 24 if k % 5 == 3 else 32


def x(k: int, n: int | None = None) -> Tensor:
    return randn(n or rows(k), 6, seed=k).float()


def tossed(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
    """Fails in forward mode for some batches."""
    h = a(x)
    return b(NoForward.apply(h) if x[0, 0] > 0 else torch.tanh(h))


CASES: dict[str, tuple[Callable[..., Tensor], Callable[[int], tuple]]] = {
    "a table": (lambda a, b, x, t: b(torch.tanh(a(x))) + t.mean(), lambda k: (x(k), torch.ones(5))),
    "prototypes": (lambda a, b, x, p: b(torch.tanh(a(x) @ a(p).T @ a(p))), lambda k: (x(k), x(99, 32))),
    "no derivative": (lambda a, b, x: b(NoForward.apply(a(x))), lambda k: (x(k),)),
    "no derivative at times": (tossed, lambda k: (x(k),)),
    "wrong in forward mode": (lambda a, b, x: b(torch.tanh(a(x)) + _hidden(a, x)), lambda k: (x(k),)),
}


def _hidden(a: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():  # which tangents pass by
        return a(x)


def train(net: nn.Module, optimizer: FishLeg, given: Callable[[int], tuple], steps: range) -> None:
    for k in steps:
        optimizer.zero_grad()
        out = net(*given(k))
        GaussianLikelihood().nll(torch.zeros_like(out), out).backward()
        optimizer.step()


def saved(net: nn.Module, optimizer: FishLeg) -> io.BytesIO:
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    return file


@pytest.mark.parametrize("loader", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_resumed_anywhere(name: str, loader: bool) -> None:
    call, given = CASES[name]

    def new() -> tuple[nn.Module, FishLeg]:
        net = Net(call)
        batches = [(given(k),) for k in range(7)] if loader else None
        return net, FishLeg(net, likelihood=GaussianLikelihood(), aux_loader=batches, update_aux_every=1)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fisher=")
        net, optimizer = new()
        files = {}
        for k in range(STEPS):
            if k in SAVED:
                files[k] = saved(net, optimizer)
            train(net, optimizer, given, range(k, k + 1))
        for k, file in files.items():
            other, resumed = new()
            state, progress = torch.load(file, weights_only=True)
            other.load_state_dict(state)
            resumed.load_state_dict(progress)
            train(other, resumed, given, range(k, STEPS))
            assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True)), k
            told, want = resumed.state_dict(), optimizer.state_dict()
            assert told["param_groups"][0]["fishleg"] == want["param_groups"][0]["fishleg"], k
