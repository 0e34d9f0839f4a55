"""Twelve kinds of models as people write them, each with a training step of its own, on data made of a seed.

A ``Case`` makes everything anew. ``likelihood`` is None where FishLeg is given ``draw`` and ``nll``.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fishleg_fast import CategoricalLikelihood, GaussianLikelihood

Loss = Callable[[int], Tensor]  # the user's forward pass in one step


@dataclass
class Case:
    """``model`` is what FishLeg is given, ``others`` modules beside it; ``owned`` tells what else is the user's."""

    model: nn.Module
    loss: Loss
    arguments: dict[str, Any]
    others: list[nn.Module] = field(default_factory=list)
    owned: Callable[[], Any] = lambda: None


def batch(step: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step))


def labels(step: int, count: int, classes: int) -> Tensor:
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(step + 1000))


class StatefulRNN(nn.Module):
    """Carries its hidden state from batch to batch, counts its calls and keeps a history of norms."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 3)
        self.hidden: Tensor | None = None
        self.calls = 0
        self.history: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        out, hidden = self.rnn(x, self.hidden)
        self.hidden = hidden.detach()
        self.calls += 1
        self.history.append(float(hidden.norm()))
        return self.head(out[:, -1])


def stateful_rnn() -> Case:
    net = StatefulRNN()
    owned = lambda: (net.hidden, net.calls, list(net.history))
    return Case(
        net, lambda s: F.cross_entropy(net(batch(s, 16, 5, 4)), labels(s, 16, 3)),
        {"likelihood": CategoricalLikelihood()}, owned=owned,
    )  # fmt: skip


class UNet(nn.Module):
    """Down, up, a skip connection, batch and group norms, dropout: a map of class logits."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.deep = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
        self.up, self.out = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Conv2d(12, 3, 1)
        self.drop = nn.Dropout2d(0.2)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        return self.out(torch.cat([skip, self.up(self.drop(self.deep(skip)))], dim=1))


def unet() -> Case:
    net = UNet()
    y = lambda s: labels(s, 4 * 64, 3).reshape(4, 8, 8)
    return Case(
        net,
        lambda s: F.cross_entropy(net(batch(s, 4, 2, 8, 8)), y(s)),
        {"likelihood": CategoricalLikelihood(class_dim=1)},
    )


class TiedGPT(nn.Module):
    """A token's embedding is its row of the head; positions of bounded norm, as many as the batch has sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8), nn.Embedding(6, 8, max_norm=1.0)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, dropout=0.1)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("mask", torch.full((6, 6), float("-inf")).triu(1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(6))
        return self.head(self.block(x, src_mask=self.mask, is_causal=True))


def tied_gpt() -> Case:
    net = TiedGPT()
    words = lambda s: labels(s, 6 * 7, 11).reshape(6, 7)
    return Case(
        net, lambda s: F.cross_entropy(net(words(s)[:, :-1]).flatten(0, 1), words(s)[:, 1:].flatten()),
        {"likelihood": CategoricalLikelihood(class_dim=-1)},
    )  # fmt: skip


class GCN(nn.Module):
    """Two rounds over an adjacency matrix as large as the batch of nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return adjacency @ self.b(torch.relu(adjacency @ self.a(x)))


def gcn() -> Case:
    net, n = GCN(), 40

    def loss(s: int) -> Tensor:
        links = (batch(s + 500, n, n) > 1).float() + torch.eye(n)
        return F.cross_entropy(net(batch(s, n, 5), links / links.sum(1, keepdim=True)), labels(s, n, 3))

    return Case(net, loss, {"likelihood": CategoricalLikelihood()})


class MixtureOfExperts(nn.Module):
    """Each sample goes to one expert, so that some have none; the loads are counted in a buffer and a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 5)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)) for _ in range(5))
        self.register_buffer("load", torch.zeros(5))
        self.seen: dict[int, int] = {}

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(1)
        chosen = weights.argmax(1)
        out = x.new_zeros(len(x), 3)
        for k in chosen.unique().tolist():
            mine = chosen == k
            self.load[k] += mine.sum()
            self.seen[k] = self.seen.get(k, 0) + int(mine.sum())
            out = out.index_put((mine.nonzero()[:, 0],), self.experts[k](x[mine]) * weights[mine, k, None])
        return out


def mixture_of_experts() -> Case:
    net = MixtureOfExperts()
    return Case(
        net, lambda s: F.cross_entropy(net(batch(s, 12, 4)), labels(s, 12, 3)),
        {"likelihood": CategoricalLikelihood()}, owned=lambda: dict(net.seen),
    )  # fmt: skip


class VAE(nn.Module):
    """Reparametrized code: reconstruction and its divergence from the prior."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(9, 8), nn.Linear(4, 9)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_var = self.encoder(x).chunk(2, dim=1)
        divergence = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1)
        return self.decoder(mean + (0.5 * log_var).exp() * torch.randn_like(mean)), divergence


def vae() -> Case:
    net = VAE()

    def nll(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits, divergence = model(x)
        return (F.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(1) + divergence).mean()

    def draw(model: nn.Module, x: Tensor) -> Tensor:
        return torch.bernoulli(model(x)[0].sigmoid())

    data = lambda s: (batch(s, 16, 9) > 0).float()
    return Case(net, lambda s: nll(net, data(s), data(s)), {"draw": draw, "nll": nll})


def pinn() -> Case:
    """u'' + sin x = 0: the residual differentiates by the inputs, which Python's generator shifts."""
    net = nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 1))

    def residual(model: nn.Module, x: Tensor) -> Tensor:
        x = (x + 0.01 * random.random()).detach().requires_grad_()
        (du,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (d2,) = torch.autograd.grad(du.sum(), x, create_graph=True)
        return d2 + torch.sin(x)

    nll = lambda model, x, y: 0.5 * (residual(model, x) - y).square().sum(1).mean()
    draw = lambda model, x: (r := residual(model, x)) + torch.randn_like(r)
    return Case(net, lambda s: nll(net, batch(s, 20, 1), torch.zeros(20, 1)), {"draw": draw, "nll": nll})


def wgan_critic() -> Case:
    """Two outputs in one step, a gradient penalty, a generator beside it, spectral norm with its power iteration."""
    critic = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)), nn.LeakyReLU(0.2), nn.Linear(8, 1))
    generator = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))

    def loss(s: int) -> Tensor:
        real, fake = batch(s, 10, 4), generator(batch(s + 77, 10, 3)).detach()
        between = (0.5 * (real + fake)).requires_grad_()
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        return critic(fake).mean() - critic(real).mean() + 10 * (slope.norm(dim=1) - 1).square().mean()

    return Case(critic, loss, {"likelihood": GaussianLikelihood()}, others=[generator])


class MultiHead(nn.Module):
    """A trunk and two heads, whose outputs are a dict; the likelihood sees one tensor of both."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.relu(self.trunk(x))
        return {"a": self.a(h), "b": self.b(h)}


def multi_head() -> Case:
    net = MultiHead()

    def nll(model: nn.Module, x: Tensor, y: tuple[Tensor, Tensor]) -> Tensor:
        out = model(x)
        return 0.5 * (out["a"] - y[0]).square().sum(1).mean() + F.cross_entropy(out["b"], y[1])

    def draw(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        out = model(x)
        return out["a"] + torch.randn_like(out["a"]), torch.multinomial(out["b"].softmax(1), 1)[:, 0]

    data = lambda s: (batch(s, 14, 5), (batch(s + 9, 14, 2), labels(s, 14, 3)))
    return Case(net, lambda s: nll(net, *data(s)), {"draw": draw, "nll": nll})


class LoRA(nn.Module):
    """A frozen layer, frozen statistics that forward updates, and a trained low-rank correction."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(6, 7), nn.Linear(6, 2, bias=False), nn.Linear(2, 7, bias=False)
        self.base.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(7), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x) + self.up(self.down(x))
        with torch.no_grad():
            self.scale.lerp_(out.std(0) + 1, 0.1)
        return out / self.scale


def lora() -> Case:
    net = LoRA()
    return Case(
        net, lambda s: F.mse_loss(net(batch(s, 18, 6)), batch(s + 3, 18, 7)), {"likelihood": GaussianLikelihood()}
    )


class Siamese(nn.Module):
    """One encoder for two batches in one call, and a momentum encoder outside of the model that forward updates."""

    def __init__(self, teacher: list[nn.Module]) -> None:
        super().__init__()
        self.encoder, self.teacher = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)), teacher

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        with torch.no_grad():
            for mine, theirs in zip(self.encoder.parameters(), self.teacher[0].parameters(), strict=True):
                theirs.lerp_(mine, 0.05)
            target = self.teacher[0](pair[1])
        return self.encoder(pair[0]) - self.encoder(pair[1]) + target


def siamese() -> Case:
    teacher: list[nn.Module] = []
    net = Siamese(teacher)
    teacher.append(copy.deepcopy(net.encoder))
    loss = lambda s: net((batch(s, 15, 5), batch(s + 1, 15, 5))).square().sum(1).mean()
    return Case(net, loss, {"likelihood": GaussianLikelihood()}, others=teacher)


def data_parallel() -> Case:
    net = nn.DataParallel(
        nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
    )
    return Case(
        net, lambda s: F.cross_entropy(net(batch(s, 20, 5)), labels(s, 20, 3)), {"likelihood": CategoricalLikelihood()}
    )


CASES: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (stateful_rnn, unet, tied_gpt, gcn, mixture_of_experts, vae, pinn, wgan_critic, multi_head, lora, siamese,
              data_parallel)
}  # fmt: skip
