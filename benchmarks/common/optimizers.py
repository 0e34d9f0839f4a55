"""The optimizers that are compared: one row each, making optimizers from a model, a likelihood and lr.

Weight decay is 0 for all of them: they are judged on the training loss, and decay minimises another one.
Everything else is the default of the peer's authors, and lr is searched (see benchmarks/study/convergence.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Make = Callable[[nn.Module, Any, float], list[torch.optim.Optimizer]]


@dataclass(frozen=True)
class Choice:
    """A row of the table: the name that people read, and how to make the optimizers that share a model."""

    label: str
    make: Make


def adamw(model: nn.Module, likelihood: Any, lr: float) -> list[torch.optim.Optimizer]:
    """torch's AdamW, fused."""
    return [torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)]


def muon(model: nn.Module, likelihood: Any, lr: float) -> list[torch.optim.Optimizer]:
    """torch's Muon for matrices, AdamW for the rest as its documentation asks; lr by `match_rms_adamw`."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, weight_decay=0.0, fused=True),
    ]


def soap(model: nn.Module, likelihood: Any, lr: float) -> list[torch.optim.Optimizer]:
    """SOAP of pytorch_optimizer: betas 0.95, preconditioner every 10 steps, as its authors have it."""
    from pytorch_optimizer import SOAP

    return [SOAP(model.parameters(), lr=lr, weight_decay=0.0)]


def fishleg(**settings: Any) -> Make:
    """FishLeg with the library's defaults (weight decay 0 among them), but for the settings named."""

    def make(model: nn.Module, likelihood: Any, lr: float) -> list[torch.optim.Optimizer]:
        from fishleg_fast import FishLeg

        return [FishLeg(model, likelihood=likelihood, lr=lr, **settings)]

    return make


# FishLeg with one default changed: what the defaults were chosen from (benchmarks.study.convergence --only ...).
VARIATIONS = {
    "fishleg-anchor-20": fishleg(anchor_every=20, anchor_decay=0.8),
    "fishleg-dense": fishleg(thin_gradients=False),
    "fishleg-medium": fishleg(precision="medium"),
    "fishleg-no-nesterov": fishleg(nesterov=False),
    "fishleg-after": fishleg(momentum="after"),
    "fishleg-shape-only": fishleg(learn_scale=False),
    "fishleg-u-momentum": fishleg(u_sampling="momentum"),
    "fishleg-aux-lr-1e-4": fishleg(aux_lr=1e-4),
    "fishleg-aux-lr-2e-3": fishleg(aux_lr=2e-3),
    "fishleg-damping-0.03": fishleg(damping=0.03),
    "fishleg-damping-0.3": fishleg(damping=0.3),
    "fishleg-anchor-50": fishleg(anchor_every=50, anchor_decay=0.5),
    "fishleg-diagkron": fishleg(structure="diagkron"),
    "fishleg-sumkron": fishleg(structure="sumkron"),
}

# What wins on transformers and convolutional nets; not yet the default.
VARIATIONS["fishleg-relative"] = fishleg(damping_scale="relative", damping=0.3)
VARIATIONS["fishleg-spectral"] = fishleg(damping_scale="relative", damping=0.3, normalize="spectral")

LABELS = {
    "fishleg-spectral": "FishLeg, spectral",
    "fishleg-medium": 'FishLeg, "medium"',
    "fishleg-dense": "FishLeg, thin_gradients=False",
}

OPTIMIZERS = {
    "adamw": Choice("AdamW", adamw),
    "muon": Choice("Muon", muon),
    "soap": Choice("SOAP", soap),
    "fishleg": Choice("FishLeg", fishleg()),
    "fishleg-anchored": Choice("FishLeg, λ only anchored", fishleg(update_aux_every=0)),
    "fishleg-pure": Choice("FishLeg, pure (anchor_every=0)", fishleg(anchor_every=0)),
    **{name: Choice(LABELS.get(name, name), make) for name, make in VARIATIONS.items()},
}
