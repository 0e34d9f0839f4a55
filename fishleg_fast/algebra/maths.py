"""What a structure computes, as functions of λ: Q u, the λ-gradients of ⟨w, Q u⟩, and the products worth keeping.

Letters follow the paper: λ is ``aux`` = {R, L, A, B, d}; P = RᵀR and S = LLᵀ are ``cache``, each only where it was
worth forming. u, w are (m, n), u in some functions of low rank, EᵀH. Every gradient is closed form; tests check each
against float64 autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .low_rank import DenseAndLowRank, LowRank, LowRankProduct

Aux = dict[str, Tensor]
Applications = tuple[int, int] | None  # how many columns P, and rows S, is going to be applied to; None: unknown


class Maths(NamedTuple):
    """What one structure computes. Two structures compute the same where this is the same object."""

    refresh: Callable[[Aux, Applications, Aux, Aux], Aux]  # λ, how often it will be used, known, memory to use -> cache
    qv: Callable[[Aux, Aux, Tensor], Tensor]  # λ, cache, u -> Q u
    grads: Callable[[Aux, Aux, Tensor, Tensor], Aux]  # λ, cache, u, w -> {name: ∂⟨w, Q u⟩/∂λ}
    diag: Callable[[Aux, Aux, int, int], Tensor]  # λ, cache, m, n -> diagonal of Q, as (m, n)
    # The same for u of low rank, where Q u then is too:
    low_rank_qv: Callable[[Aux, Aux, LowRank], LowRankProduct] | None = None
    low_rank_grads: Callable[[Aux, LowRank, LowRankProduct, DenseAndLowRank], Aux] | None = None  # λ, u, Q u, w -> ...


def no_cache(aux: Aux, applications: Applications, known: Aux, memory: Aux) -> Aux:
    return {}
