"""The models that are stepped: models, a batch of noise, and the likelihood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.common import models
from fishleg_fast import BernoulliLikelihood, CategoricalLikelihood
from fishleg_fast.likelihoods import Likelihood


class TransformerBlock(models.TransformerBlock):
    """Its attention in plain products, since torch's fused kernels have no forward derivative on a GPU."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(future, -1e9).softmax(-1) @ v


def transformer(width: int, layers: int, heads: int, classes: int) -> nn.Sequential:
    """(batch, positions, width) -> logits (batch, positions, classes). Its inputs are embedded already."""
    return nn.Sequential(
        *(TransformerBlock(width, heads) for _ in range(layers)), nn.LayerNorm(width), nn.Linear(width, classes)
    )


@dataclass(frozen=True)
class Case:
    """A model to be stepped; inputs are uniform noise, and an autoencoder's targets are its inputs."""

    title: str
    make_model: Callable[[], nn.Module]
    make_likelihood: Callable[[], Likelihood]
    inputs: tuple[int, ...]  # shape
    labels: tuple[int, ...] | None = None  # shape of class indices; None: an autoencoder
    classes: int = 0

    @property
    def published(self) -> bool:
        """Whether the published way, as benchmarks/common/published.py has it, can do it: it knows Linears only."""
        return self.labels is None

    def batch(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and targets."""
        inputs = torch.rand(self.inputs, device=device)
        if self.labels is None:
            return inputs, inputs
        return inputs, torch.randint(self.classes, self.labels, device=device)


def autoencoder_case(widths: tuple[int, ...], batch: int) -> Case:
    title = "-".join(map(str, widths)) + f" and back, batch {batch}"
    return Case(title, lambda: models.autoencoder(widths), BernoulliLikelihood, (batch, widths[0]))


def resnet_case(width: int, batch: int, size: int) -> Case:
    title = f"ResNet18 of width {width}, batch {batch} of 3×{size}×{size}"
    return Case(
        title, lambda: models.ResNet18(width=width), CategoricalLikelihood, (batch, 3, size, size), (batch,), 10
    )


def transformer_case(width: int, layers: int, heads: int, classes: int, batch: int, positions: int) -> Case:
    title = f"transformer, {layers} layers of width {width}, {batch}×{positions} positions"
    return Case(
        title,
        lambda: transformer(width, layers, heads, classes),
        lambda: CategoricalLikelihood(class_dim=-1),
        (batch, positions, width),
        (batch, positions),
        classes,
    )


CASES = {
    "mnist": autoencoder_case(models.MNIST_WIDTHS, 100),
    "faces": autoencoder_case(models.FACES_WIDTHS, 100),
    "resnet18": resnet_case(64, 128, 32),
    "transformer": transformer_case(768, 12, 12, 768, 8, 256),
}
TINY = {
    "mnist": autoencoder_case((6, 5, 3), 4),
    "faces": autoencoder_case((5, 7, 2), 4),
    "resnet18": resnet_case(2, 4, 8),
    "transformer": transformer_case(8, 1, 2, 5, 2, 3),
}
