"""Diagonal: Q u = d²∘u."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from ..factors import divided, spread
from ..maths import Aux, Maths, no_cache
from ..matrix import Matrix, dense
from .base import Structure, finite, float_dtype


def diagonal_qv(aux: Aux, cache: Aux, u: Tensor) -> Tensor:
    d = aux["d"]
    return d * d * u


def diagonal_grads(aux: Aux, cache: Aux, u: Tensor, w: Tensor) -> Aux:
    return {"d": 2 * aux["d"] * u * w}


def diagonal_diag(aux: Aux, cache: Aux, m: int, n: int) -> Tensor:
    return aux["d"] * aux["d"]


DIAGONAL = Maths(no_cache, diagonal_qv, diagonal_grads, diagonal_diag)


class Diagonal(Structure):
    """Q u = d²∘u, for a block of any ``shape``; λ is d, of that shape."""

    maths = DIAGONAL
    moments = ("diagonal",)

    def __init__(
        self,
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(shape)
        self.fishleg_aux = {"d": torch.ones(self.shape, dtype=float_dtype(dtype), device=device)}

    @torch.no_grad()
    def _start_sgd(self, scale: float) -> None:
        self.fishleg_aux["d"].fill_(scale**0.5)

    def new_moments(self) -> Aux:
        return {"diagonal": torch.zeros_like(self.fishleg_aux["d"])}

    @torch.no_grad()
    def gradient_moments(self, grads: Sequence[Tensor]) -> Aux:
        """E[g²]."""
        return {"diagonal": reduce(torch.add, (g * g for g in grads)) / len(grads)}

    @torch.no_grad()
    def layer_moments(self, a: Tensor, e: Tensor, count: float, positions: int | None = None) -> Aux:
        """count·Σ (e∘e)(a∘a)ᵀ: exact where every sample has one position; positions count as uncorrelated elsewhere."""
        groups = a.shape[0] // max(e.shape[0], 1)  # of a grouped convolution: rows of e's columns, each its own a's
        if groups <= 1:
            return {"diagonal": (e * e).T @ (a * a) * count}
        e, a = e.unflatten(1, (groups, -1)).movedim(1, 0), a.unflatten(0, (groups, -1))
        return {"diagonal": ((e * e).mT @ (a * a)).flatten(0, 1) * count}

    @torch.no_grad()
    def mean_eigenvalue(self, moments: Aux, weight: float = 1.0) -> Tensor:
        """The mean of diag F."""
        return moments["diagonal"].sum() / weight / max(moments["diagonal"].numel(), 1)

    @torch.no_grad()
    def fisher_product(self, moments: Aux, weight: Tensor | float, v: Matrix) -> Matrix:
        """diag F ∘ v."""
        return moments["diagonal"] * dense(v) / weight

    def natural_update(
        self, aux: Aux, moments: Aux, damping: float, rate: Tensor, weight: Tensor | float = 1.0
    ) -> tuple[Aux, Tensor]:
        """1/d² ← (1−rate)/d² + rate·(diag F + γ)."""
        d, mean = aux["d"], divided(moments["diagonal"], weight)
        inverse = torch.lerp(d.square().reciprocal(), mean + damping, spread(rate, d))
        return {"d": inverse.rsqrt()}, torch.isfinite(inverse).flatten(rate.ndim).all(-1)

    @torch.no_grad()
    def kfac_start(
        self, moments: Aux, damping: float, weight: Tensor | float = 1.0, floor: float = 0.0
    ) -> tuple[Aux, Tensor] | None:
        """d² = 1/(diag F + γ); ``moments``: "diagonal", of the block's shape."""
        found = moments["diagonal"]
        batch = found.ndim - self.fishleg_aux["d"].ndim
        return {"d": (divided(found, weight) + damping).rsqrt()}, finite(moments, batch)
