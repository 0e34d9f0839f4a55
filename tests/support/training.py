"""Training an autoencoder with low-rank gradients or with dense ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fishleg_fast import FishLeg, GaussianLikelihood
from fishleg_fast.algebra.low_rank import LowRank
from support.dense import flat, randn


def autoencoder(bias: bool = True) -> nn.Sequential:
    sizes = [40, 60, 30, 60, 40]
    layers = [[nn.Linear(n, m, bias=bias), nn.Tanh()] for n, m in itertools.pairwise(sizes)]
    return nn.Sequential(*[module for pair in layers for module in pair][:-1])


def train(
    net: nn.Module, optimizer: FishLeg, span: range, time: tuple = (), sizes: tuple = (6,), bias: bool = True
) -> list[bool | None]:
    """Whether the gradients of all matrices were low-rank, of each step; None where those of some were."""
    was, gather, maximize = [], FishLeg._gather, optimizer.defaults["maximize"]

    def spy() -> tuple:
        blocks, gs = gather(optimizer)
        kinds = {isinstance(g, LowRank) for g in gs if min(g.shape) > 1}
        was.append(kinds.pop() if len(kinds) == 1 else None)
        return blocks, gs

    optimizer._gather = spy
    for step in span:
        x = randn(sizes[step % len(sizes)], *time, 40, seed=step).sigmoid().to(next(net.parameters()).dtype)
        optimizer.zero_grad()
        loss = optimizer.likelihood.nll(x, net(x))
        (-loss if maximize else loss).backward()
        for p in net.parameters():
            p.grad = p.grad if bias or p.ndim > 1 else None
        optimizer.step()
    return was


def make(low_rank: bool = True, build: Callable[[], nn.Module] = autoencoder, dtype=torch.float64, **options) -> tuple:
    """A large aux_eps, since Adam on λ blows up gradients that are nothing but rounding."""
    torch.manual_seed(0)
    net = build().to(dtype)
    if params := options.pop("params", None):
        options["params"] = params(net)
    likelihood = options.pop("likelihood", GaussianLikelihood)()
    options = {"update_aux_every": 3, "anchor_every": 6, "aux_eps": 1e-3, "aux_lr": 1e-2, "lr": 5e-3, **options}
    return net, FishLeg(net, likelihood=likelihood, thin_gradients=low_rank, **options)


def state(optimizer: FishLeg) -> Tensor:
    aux = [t for b in optimizer.blocks for t in (*b.structure.fishleg_aux.values(), b.momentum)]
    return flat([p.detach() for group in optimizer.param_groups for p in group["params"]] + aux)
