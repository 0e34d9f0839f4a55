"""Small trainings whose steps are limited, and which of them are measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fishleg_fast import FishLeg, GaussianLikelihood
from support.dense import randn


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double()


def mlp(outputs: int = 3) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)))


def linear(**settings: Any) -> tuple[nn.Linear, FishLeg, GaussianLikelihood, Tensor, Tensor]:
    """A loss that is its own quadratic model."""
    likelihood = GaussianLikelihood()
    net = seeded(lambda: nn.Linear(4, 2))
    settings = {"lr": 50.0, "curvature_batch": None, **settings}
    return net, FishLeg(net, likelihood=likelihood, **settings), likelihood, randn(12, 4), randn(12, 2)


def take(net: nn.Module, optimizer: FishLeg, nll: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = nll(y, net(x))
    loss.backward()
    optimizer.step()
    return loss.detach()


class Watched:
    """A training of one sample's fit, and which of its steps are measured."""

    def __init__(self, lr: float, **settings: Any) -> None:
        self.net, self.optimizer, self.likelihood, self.x, self.y = linear(lr=lr, **settings)
        self.steps: list[int] = []
        assert self.optimizer._limit is not None
        self.limit = self.optimizer._limit
        self._factor, self.limit.factor = self.limit.factor, self.factor  # type: ignore[method-assign]

    def factor(self, step: int, lr: float, measured: Any) -> Tensor:
        self.steps.append(step)
        return self._factor(step, lr, measured)

    def take(self, steps: int = 1, lr: float | None = None) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] if lr is None else lr
        for _ in range(steps):
            take(self.net, self.optimizer, self.likelihood.nll, self.x, self.y)

    def believe(self, length: float) -> None:
        """As if the latest step had been of that length in those of the limit, and the next ones were not due."""
        self.limit._read()
        self.limit._length, self.limit._next = length, 1000

    def step(self, lr: float) -> list[Tensor]:
        before = [p.detach().clone() for p in self.net.parameters()]
        self.take(lr=lr)
        return [p.detach() - b for p, b in zip(self.net.parameters(), before, strict=True)]
