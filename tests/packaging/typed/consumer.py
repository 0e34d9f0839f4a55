"""A user's program, which mypy --strict must pass. It is read and not run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fishleg_fast import (
    BernoulliLikelihood,
    CategoricalLikelihood,
    FishLeg,
    FishLinear,
    FishModule,
    GaussianLikelihood,
    Kron,
    Likelihood,
    __version__,
)

Batches = list[tuple[Tensor, Tensor]]


class Scaled(FishModule):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.fishleg_aux = {"d": torch.ones(n)}

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x

    def Qv(self, v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.fishleg_aux["d"].square() * v[0],)


class PoissonLikelihood(Likelihood):
    def nll(self, targets: Tensor, outputs: Tensor) -> Tensor:
        return (outputs.exp() - targets * outputs).sum() / len(outputs)

    def draw(self, outputs: Tensor) -> Tensor:
        return torch.poisson(outputs.exp())

    def fisher_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        return outputs.exp() * v


def short_call(net: nn.Module, batches: Batches) -> str:
    likelihood = CategoricalLikelihood()
    optimizer = FishLeg(net, likelihood=likelihood, lr=1e-2, structure={"head": "diagkron", "*": "kron"}, backend="cpp")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = likelihood.nll(targets, net(inputs))
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    optimizer.load_state_dict(optimizer.state_dict())
    damping: float = optimizer.settings.damping
    return f"{damping} {optimizer.diagnostics()['skipped_steps']} {FishLeg.estimate(net)}"


def authors_call(net: nn.Module, auxloader: Batches) -> torch.optim.Optimizer:
    likelihood = GaussianLikelihood(sigma=0.5)

    def nll(model: nn.Module, data_x: Tensor, data_y: Tensor) -> Tensor:
        return likelihood.nll(data_y, model(data_x))

    def draw(model: nn.Module, data_x: Tensor) -> Tensor:
        return likelihood.draw(model(data_x))

    return FishLeg(net, draw, nll, likelihood, auxloader)


def parameter_groups(net: nn.Sequential) -> FishLeg:
    params = [{"params": net[0].parameters(), "lr": 1e-3}, {"params": net[1].parameters(), "normalize": "spectral"}]
    return FishLeg(net, likelihood=BernoulliLikelihood(), params=params)


def main() -> None:
    net = nn.Sequential(FishLinear(4, 4, structure=Kron), Scaled(4))
    print(__version__, short_call(net, []), authors_call(net, []), parameter_groups(net), PoissonLikelihood())
