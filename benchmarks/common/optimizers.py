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

from benchmarks.common.muon import Muon

Make = Callable[[nn.Module, Any, float], list[torch.optim.Optimizer]]


@dataclass(frozen=True)
class Choice:
    """A row of the table: the name that people read, and how to make the optimizers that share a model."""

    label: str
    make: Make


def adamw(betas: tuple[float, float] = (0.9, 0.999)) -> Make:
    """torch's AdamW, fused; betas are torch's unless named."""

    def make(model: nn.Module, likelihood: Any, lr: float) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(model.parameters(), lr=lr, betas=betas, weight_decay=0.0, fused=True)]

    return make


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """What Muon is for: the weights of linear layers and convolutions, without embeddings and the model's `head`.

    The autoencoder has no head: all its weights are Muon's.
    """
    others: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    others += [head] if isinstance(head := getattr(model, "head", None), nn.Module) else []
    excluded = {id(p) for m in others for p in m.parameters()}
    return [p for p in model.parameters() if p.ndim >= 2 and id(p) not in excluded]


def muon(rest: float = 1.0) -> Make:
    """Muon for hidden matrices, its steps of the size of AdamW's; AdamW at `rest` times lr for what is left."""

    def make(model: nn.Module, likelihood: Any, lr: float) -> list[torch.optim.Optimizer]:
        matrices = hidden_matrices(model)
        taken = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in taken]
        return [
            Muon(matrices, lr=lr),
            torch.optim.AdamW(others, lr=rest * lr, weight_decay=0.0, fused=True),
        ]

    return make


FROM_PYTORCH_OPTIMIZER = ("soap", "psgd")  # rows whose first use imports a large package


def soap(model: nn.Module, likelihood: Any, lr: float) -> list[torch.optim.Optimizer]:
    """SOAP of pytorch_optimizer: betas 0.95, preconditioner every 10 steps, as its authors have it."""
    from pytorch_optimizer import SOAP

    return [SOAP(model.parameters(), lr=lr, weight_decay=0.0)]


def psgd(model: nn.Module, likelihood: Any, lr: float) -> list[torch.optim.Optimizer]:
    """PSGD of pytorch_optimizer with Kronecker factors, renewed at each step at first, as its authors have it.

    It needs opt_einsum beside torch, without which its products are formed in an order that takes seconds a step.
    """
    import numpy
    from pytorch_optimizer import Kron

    numpy.random.seed(torch.initial_seed() % 2**32)  # it draws from numpy's generator when to balance its factors
    return [Kron(model.parameters(), lr=lr, weight_decay=0.0)]


def fishleg(**settings: Any) -> Make:
    """FishLeg with the library's defaults (weight decay 0 among them), but for the settings named."""

    def make(model: nn.Module, likelihood: Any, lr: float) -> list[torch.optim.Optimizer]:
        from fishleg_fast import FishLeg

        return [FishLeg(model, likelihood=likelihood, lr=lr, **settings)]

    return make


def unlimited(**settings: Any) -> Make:
    """The same without ``step_limit``, as all rows but the default were measured."""
    return fishleg(step_limit=None, **settings)


LEARNED = 10  # update_aux_every of all rows in which λ is learned besides being anchored: the default until 2026-11-28

# FishLeg with one default changed: what the defaults were chosen from (benchmarks.study.convergence --only ...).
VARIATIONS = {
    "fishleg-anchor-20": unlimited(anchor_every=20, anchor_decay=0.8),
    "fishleg-dense": fishleg(thin_gradients=False),
    "fishleg-medium": fishleg(precision="medium"),
    "fishleg-no-nesterov": unlimited(nesterov=False),
    "fishleg-after": unlimited(momentum="after"),
    "fishleg-shape-only": unlimited(learn_scale=False, update_aux_every=LEARNED),
    "fishleg-u-momentum": unlimited(u_sampling="momentum", update_aux_every=LEARNED),
    "fishleg-aux-lr-1e-4": unlimited(aux_lr=1e-4, update_aux_every=LEARNED),
    "fishleg-aux-lr-2e-3": unlimited(aux_lr=2e-3, update_aux_every=LEARNED),
    "fishleg-damping-5": unlimited(damping=5.0),
    "fishleg-damping-20": unlimited(damping=20.0),
    "fishleg-absolute": unlimited(damping_scale="absolute", normalize="rms", update_aux_every=LEARNED),
    "fishleg-rms": unlimited(normalize="rms"),
    "fishleg-spectral": unlimited(normalize="spectral"),
    "fishleg-training-labels": unlimited(anchor_from="training"),
    "fishleg-anchor-50": unlimited(anchor_every=50, anchor_decay=0.5),
    "fishleg-diagkron": unlimited(structure="diagkron"),
    "fishleg-sumkron": unlimited(structure="sumkron"),
}

LABELS = {
    "fishleg-absolute": 'FishLeg, absolute damping and "rms"',
    "fishleg-medium": 'FishLeg, "medium"',
    "fishleg-dense": "FishLeg, thin_gradients=False",
}

OPTIMIZERS = {
    "adamw": Choice("AdamW", adamw()),
    "muon": Choice("Muon", muon()),
    "soap": Choice("SOAP", soap),
    "psgd": Choice("PSGD Kron", psgd),
    "fishleg": Choice("FishLeg", fishleg()),
    "fishleg-unlimited": Choice("FishLeg, step_limit=None", unlimited()),
    "fishleg-learned": Choice("FishLeg, λ learned between anchorings", unlimited(update_aux_every=LEARNED)),
    "fishleg-pure": Choice("FishLeg, pure", fishleg(anchor_every=0, init="sgd")),
    "fishleg-pure-unlimited": Choice("FishLeg, pure, step_limit=None", unlimited(anchor_every=0, init="sgd")),
    "fishleg-pure-adam": Choice("FishLeg, pure, by Adam", unlimited(anchor_every=0, init="sgd", aux_update="adam")),
    "adamw-0.95": Choice("AdamW, β₂ = 0.95", adamw((0.9, 0.95))),
    "muon-rest-x0.3": Choice("Muon, AdamW's lr x 0.3", muon(0.3)),
    "muon-rest-x3": Choice("Muon, AdamW's lr x 3", muon(3.0)),
    **{name: Choice(LABELS.get(name, name), make) for name, make in VARIATIONS.items()},
}
