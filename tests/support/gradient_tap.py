"""Training whose gradients are made in various ways, with low-rank gradients and with dense ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fishleg_fast import FishLeg, GaussianLikelihood
from support.dense import flat, randn, relative

LIKELIHOOD = GaussianLikelihood()
FIRST_DENSE, LOW_RANK = [False, True], [True, True]


def two_layers(activation: nn.Module | None = None, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 24, bias=bias), activation or nn.Tanh(), nn.Linear(24, 16))


class Custom(nn.Module):
    """Two layers, the first of which ``call`` calls."""

    def __init__(
        self, call: Callable[[nn.Module, Tensor], Tensor] = lambda f, x: f(x), first: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.a, self.b, self.call = first or nn.Linear(20, 20), nn.Linear(20, 16), call

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.call(self.a, x)))


class Training:
    """A model, its optimizer and its data."""

    def __init__(self, net: nn.Module, low_rank: bool = True, dtype: torch.dtype = torch.float64, **options) -> None:
        self.net, self.dtype, self.batch, self.step = net.to(dtype), dtype, 3, 0
        # A large aux_eps: Adam on λ would blow up gradients that are nothing but rounding.
        rates = {"aux_eps": 1e-3, "aux_lr": 1e-2}
        options = {"update_aux_every": 2, "anchor_every": 3, "normalize": "rms", **rates, **options}
        self.optimizer = FishLeg(self.net, likelihood=LIKELIHOOD, thin_gradients=low_rank, **options)

    def data(self, part: int = 0) -> tuple[Tensor, Tensor]:
        seed = 100 * self.step + part
        return randn(self.batch, 20, seed=seed, dtype=self.dtype), randn(self.batch, 16, seed=seed + 50).to(self.dtype)

    def loss(self, part: int = 0) -> Tensor:
        x, y = self.data(part)
        return LIKELIHOOD.nll(y, self.net(x))

    def said(self) -> list[bool]:
        """Of each matrix: whether its gradient is low-rank now."""
        tap, blocks = self.optimizer._gradients, [b for b in self.optimizer.blocks if b.shape[1] > 1]
        for b in blocks:
            b.grads = [part.param.grad for part in b.parts]
        return [found is not None for found in tap.low_rank(blocks)]

    def used(self) -> list[bool]:
        """Of each matrix: whether its latest step was a low-rank one."""
        return [b.product_known for b in self.optimizer.blocks if b.shape[1] > 1]

    def state(self) -> Tensor:
        aux = [t for b in self.optimizer.blocks for t in (*b.structure.fishleg_aux.values(), b.momentum)]
        return flat([t.detach().double() for t in (*self.net.parameters(), *aux)])


Way = Callable[[Training], Any]


def usual(t: Training) -> None:
    t.loss().backward()


def take_step(t: Training, way: Way = usual) -> None:
    t.optimizer.zero_grad()
    way(t)
    t.optimizer.step()


def check(
    way: Way, expected: list | None, build: Callable[[], nn.Module] = two_layers, after: Way = lambda t: None, **options
) -> None:
    """Five steps with gradients made in this way are those that dense ones give; low-rank where expected."""
    states = []
    for low_rank in (True, False):
        torch.manual_seed(0)
        t = Training(build(), low_rank, **options)
        after(t)
        for t.step in range(5):
            t.optimizer.zero_grad()
            way(t)
            assert not low_rank or expected in (None, t.said()), f"step {t.step}"
            t.optimizer.step()
            assert not low_rank or expected in (None, t.used()), f"step {t.step}"
        assert t.optimizer.diagnostics()["steps"] == 5
        states.append(t.state())
    assert relative(*states) <= 1e-10
