"""Muon, as torch.optim.Muon with `match_rms_adamw`, in the parameters' own precision and for convolutions too."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalized(matrix: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """About U Vᵀ of a matrix U S Vᵀ, by Newton and Schulz's iteration with the coefficients of Muon's author."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp_min(eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """torch's own rounds its products to bfloat16, which many CPUs only emulate, and takes matrices only.

    Here a convolution's kernel is a matrix of a row per output channel, as Muon's author has it.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3, momentum: float = 0.95) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, nesterov=True, ns_steps=5))
        if any(p.ndim < 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("Muon should be given matrices and convolutions' kernels only.")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step from the gradients that are there."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                average = self.state[p]["momentum_buffer"]
                average.lerp_(p.grad, 1 - group["momentum"])
                direction = p.grad.lerp(average, group["momentum"]).reshape(len(p), -1)
                scale = 0.2 * max(direction.shape) ** 0.5  # the root mean square of AdamW's steps
                p.add_(orthogonalized(direction, group["ns_steps"]).view_as(p), alpha=-scale * group["lr"])
