"""Small models for trainings by several ranks: usual ones, and those that need care."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Attend(nn.Module):
    """A small transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.unflatten(1, (2, 6)))
        h = h + self.attention(self.norm(h), self.norm(h), self.norm(h), need_weights=False)[0]
        return self.head(h)


class Unused(nn.Module):
    """One layer of two, of which a batch uses that of its first number; each rank may use another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 5) for _ in range(2)])
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers[int(x[0, 0] > 0)](x).tanh())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3))


def convolutions() -> nn.Module:
    first = nn.Conv2d(1, 4, 3, padding=1)
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)), first, nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)
    )


class Mix(nn.Module):
    """A layer of a transformer that is made of plain ones: attention over positions, and a small net."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.RMSNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](h)).unflatten(2, (2, -1)).transpose(1, 2).chunk(3, -1)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.norms[1](h))))


class Gpt(nn.Module):
    """Words, positions, layers."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(4, width), nn.Embedding(6, width)
        self.layers = nn.ModuleList([Mix(width) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        words = (x[:, :6] > 0) * 2 + (x[:, 6:] > 0.5)
        h = self.words(words) + self.positions(torch.arange(6).expand(len(x), 6))
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h)).mean(1)


class Residual(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2)])
        self.norms = nn.ModuleList([nn.GroupNorm(2, width) for _ in range(2)])

    def forward(self, h: Tensor) -> Tensor:
        y = self.norms[0](self.convolutions[0](h)).relu()
        return (h + self.norms[1](self.convolutions[1](y))).relu()


def resnet() -> nn.Module:
    """Without BatchNorm, whose statistics are of a rank's own batch."""
    first = nn.Conv2d(1, 4, 3, padding=1)
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)), first, Residual(4), Residual(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip


class Scaled(nn.Linear):
    """Not what it shows."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.05, self.bias)


def scaled() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 7), nn.Tanh(), Scaled(7, 7), nn.Tanh(), nn.Linear(7, 3))


class Checkpointed(nn.Module):
    """Layers that run once more during the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 7), nn.Linear(7, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = checkpoint(layer, x, use_reentrant=False).tanh()
        return self.last(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.RNN(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x.unflatten(1, (3, 4)))[0][:, -1])


class Opaque(torch.autograd.Function):
    """tanh, without a forward derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(y := x.tanh())
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * (1 - ctx.saved_tensors[0].square())


class WithOpaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Opaque.apply(self.first(x)))


class Hidden(nn.Module):
    """A layer that hides from one of two derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.first(x)
        return self.last((h + self.first(x)).tanh())


class Padded(nn.Module):
    """Words of which one is padding, whose vectors are the last layer's weights too."""

    def __init__(self, tied: bool = True, sparse: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(3, 4, padding_idx=0, sparse=sparse)
        self.hidden, self.head = nn.Linear(4, 4), nn.Linear(4, 3, bias=False)
        if tied:
            self.head.weight = self.words.weight
        with torch.no_grad():
            self.words.weight[0] = 0.3

    def forward(self, x: Tensor) -> Tensor:
        words = (x > -0.5).long() + (x > 0.5)
        return self.head(self.hidden(self.words(words).mean(1)).tanh())


class OwnParameter(nn.Module):
    """A layer beside a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 12))
        self.first, self.last = nn.Linear(12, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x * self.scale).tanh())


def frozen() -> nn.Module:
    net = mlp()
    for p in net[0].parameters():
        p.requires_grad_(False)
    return net


def with_hook() -> nn.Module:
    """Its inputs are scaled before its forward."""
    net = mlp()
    net.register_forward_pre_hook(lambda module, args: (args[0] / 5,))
    return net


def with_old_weight_norm() -> nn.Module:
    """A weight is made before each forward, of parameters."""
    net = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(net[2])
    return net


MODELS = {
    "padded": Padded,
    "sparse": partial(Padded, tied=False, sparse=True),
    "own parameter": OwnParameter,
    "frozen": frozen,
    "hook": with_hook,
    "old weight norm": with_old_weight_norm,
    "mlp": mlp,
    "attention": Attend,
    "convolutions": convolutions,
    "unused": Unused,
    "gpt": Gpt,
    "wide gpt": partial(Gpt, 32),
    "resnet": resnet,
    "checkpointed": Checkpointed,
    "scaled": scaled,
    "hidden": Hidden,
    "opaque": WithOpaque,
    "recurrent": Recurrent,
}
