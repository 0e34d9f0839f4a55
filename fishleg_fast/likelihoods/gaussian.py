"""Targets that are normally distributed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Likelihood, batch_size, of_each_row
from .checks import check_elementwise


class GaussianLikelihood(Likelihood):
    """y ~ N(outputs, σ²I). nll sums over the output's dimensions and means over the batch, constants included.

    Args:
        sigma: σ > 0, in the targets' units; ValueError otherwise.
        learn: make σ a trainable parameter, ``log_sigma``.
    """

    def __init__(self, sigma: float = 1.0, learn: bool = False) -> None:
        super().__init__()
        if not (isinstance(sigma, (int, float)) and 0 < sigma < math.inf):
            raise ValueError(f"sigma should be a positive number but is: {sigma!r}")
        self._fixed = float(sigma)
        self.log_sigma = nn.Parameter(torch.tensor(math.log(sigma))) if learn else None

    @property
    def sigma(self) -> Tensor:
        """σ: a scalar tensor."""
        return torch.tensor(self._fixed, device="cpu") if self.log_sigma is None else self.log_sigma.detach().exp()

    @of_each_row
    def nll(self, targets: Tensor, outputs: Tensor) -> Tensor:
        check_elementwise("GaussianLikelihood", targets, outputs)
        self._note_for(GaussianLikelihood, targets, outputs)
        log_sigma: Tensor | float = math.log(self._fixed)
        precision: Tensor | float = self._fixed**-2
        if self.log_sigma is not None:
            log_sigma = self.log_sigma.to(outputs.device)
            precision = torch.exp(-2 * log_sigma)
        batch = outputs.shape[0]
        squares = (targets - outputs).square().sum() * precision
        return 0.5 * squares / batch + outputs.numel() / batch * (log_sigma + 0.5 * math.log(2 * math.pi))

    def draw(self, outputs: Tensor) -> Tensor:
        return outputs + self.sigma.to(outputs) * torch.randn_like(outputs)

    def fisher_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        """v/(σ²B)"""
        precision = self._fixed**-2 if self.log_sigma is None else torch.exp(-2 * self.log_sigma.detach()).to(v)
        return v * precision / batch_size(outputs)

    def own_fisher_product(self, outputs: Tensor, vs: Sequence[Tensor]) -> list[Tensor]:
        """2D v for log σ, D the dimensions of one output."""
        return [2 * outputs.numel() / batch_size(outputs) * v for v in vs]
