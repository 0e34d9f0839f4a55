"""The benchmark models, in plain torch layers: one definition for every optimizer.

`autoencoder` is the deep autoencoder of the optimization literature (Hinton & Salakhutdinov 2006, Martens
2010) with ReLU for the sigmoids; `ResNet18` is the usual variant for small images (3×3 stem without pooling);
`GPT` a small transformer with LayerNorm first; `ByteMLP` a wide network without weights used twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CURVES_WIDTHS = (784, 400, 200, 100, 50, 25, 6)
MNIST_WIDTHS = (784, 1000, 500, 250, 30)
FACES_WIDTHS = (625, 2000, 1000, 500, 30)
DIGITS_WIDTHS = (64, 100, 50, 25, 10)


def autoencoder(widths: Sequence[int] = CURVES_WIDTHS) -> nn.Sequential:
    """Encoder through `widths` and the mirrored decoder: (batch, widths[0]) -> logits of the same shape.

    ReLU between the layers; the code and the output are linear. Weights as He et al. (2015): normal with
    variance 2/fan_in in every layer; biases zero.
    """
    if len(widths) < 2:
        raise ValueError(f"widths should name at least the input's and the code's, but is: {tuple(widths)}")
    sizes = [*widths, *reversed(widths[:-1])]
    code = len(widths) - 2  # index of the layer whose output is the code
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        layers.append(linear)
        if i not in (code, len(sizes) - 2):
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a short cut, which is a 1×1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.short = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.short = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels_in, h, w) -> (batch, channels, h/stride, w/stride)."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.short(x))


class ResNet18(nn.Module):
    """ResNet18 for small images, (batch, channels_in, h, w) -> (batch, classes).

    `width` is the number of channels of the first of the four stages; each next one has twice as many.
    """

    def __init__(self, channels_in: int = 3, classes: int = 10, width: int = 64) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width should be 1 or more but is: {width}")
        self.stem = nn.Conv2d(channels_in, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        stages: list[nn.Module] = []
        last = width
        for stage in range(4):
            channels = width * 2**stage
            for block in range(2):
                stages.append(BasicBlock(last, channels, 2 if stage > 0 and block == 0 else 1))
                last = channels
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(last, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        x = self.stages(F.relu(self.norm(self.stem(x))))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class TransformerBlock(nn.Module):
    """Causal self-attention and a GELU network, each after a LayerNorm and around a short cut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) -> the same."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries, keys and values, (batch, heads, time, width/heads) each -> the same."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class GPT(nn.Module):
    """A decoder-only transformer over bytes: (batch, time) int64 -> logits (batch, time, vocab).

    Weights are normal with standard deviation 0.02, biases zero, as GPT-2 has them.
    """

    def __init__(self, layers: int = 4, width: int = 128, heads: int = 4, context: int = 128, vocab: int = 256) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """See above."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class ByteMLP(nn.Module):
    """A wide network from the bytes before: (batch, context) int64 -> logits of the next one (batch, vocab).

    Embeddings of the bytes side by side, and linear layers of `widths` with ReLU; torch's own initial weights.
    """

    def __init__(
        self, context: int = 16, size: int = 32, widths: Sequence[int] = (1024, 512), vocab: int = 256
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, size)
        sizes = [context * size, *widths]
        self.hidden = nn.Sequential(
            *(layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU()))
        )
        self.head = nn.Linear(sizes[-1], vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        """See above."""
        return self.head(self.hidden(self.tokens(tokens).flatten(1)))
