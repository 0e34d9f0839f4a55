"""A small classifier, its optimizer and its data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fishleg_fast import CategoricalLikelihood, FishLeg

LIKELIHOOD = CategoricalLikelihood()


def make(**settings) -> tuple[nn.Sequential, FishLeg]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))
    return net, FishLeg(net, likelihood=LIKELIHOOD, **{"update_aux_every": 2, "anchor_every": 3, **settings})


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(20, 6, generator=generator), torch.randint(4, (20,), generator=generator)


def train(net: nn.Module, optimizer: FishLeg, steps: int, start: int = 0) -> list[float]:
    losses = []
    for step in range(start, start + steps):
        x, y = data(step)
        optimizer.zero_grad()
        loss = LIKELIHOOD.nll(y, net(x))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
