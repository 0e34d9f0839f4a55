"""Targets that are zero or one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import LOOKED_AT, Likelihood, alike, batch_size, of_each_row
from .checks import check_elementwise, looked_at

ROUNDING = 1e-4  # of grey values that were resized or averaged


class BernoulliLikelihood(Likelihood):
    """Independent y ∈ {0, 1} (or a grey value between) with logits ``outputs``, what a sigmoid makes probabilities of.

    nll sums over dimensions and means over the batch. A model that ends in a sigmoid should return what that is given.
    On a CPU a target outside [0, 1] raises a ValueError.
    """

    @of_each_row
    def nll(self, targets: Tensor, outputs: Tensor) -> Tensor:
        check_elementwise("BernoulliLikelihood", targets, outputs)
        if looked_at(targets):
            least, most = map(float, targets.aminmax())
            if least < -ROUNDING or most > 1 + ROUNDING:
                raise ValueError(
                    f"targets should be in [0, 1] but are from {least:.4g} to {most:.4g}; scale them to it (pixels / "
                    "255, no normalization), or use GaussianLikelihood where they have no bounds"
                )
        self._note_for(BernoulliLikelihood, targets, outputs)
        loss = F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="sum")
        return loss / outputs.shape[0]

    def targets_behind(self, outputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor] | None:
        """Binary cross entropy's gradient p − y is negative where y is 1. Grey values are not told by it."""
        if type(self).nll is not BernoulliLikelihood.nll:
            return None
        targets, some = (gradient < 0).to(outputs.dtype), len(outputs) // LOOKED_AT + 1
        expected = torch.sigmoid(outputs[::some].float()) - targets[::some]
        return targets, alike(gradient[::some].reshape(1, -1), expected.reshape(1, -1), 0.95)  # signs agree anyway

    def draw(self, outputs: Tensor) -> Tensor:
        p = torch.sigmoid(outputs)
        return (torch.rand_like(p) < p).to(p.dtype)  # torch.bernoulli would stop at outputs that are not finite

    def fisher_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        """p(1−p)∘v/B"""
        p = torch.sigmoid(outputs)
        return p * (1 - p) * v / batch_size(outputs)
