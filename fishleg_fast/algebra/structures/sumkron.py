"""Sum of block Kroneckers: Q u = Σₖ Pₖ u Sₖ."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..low_rank import DenseAndLowRank, LowRank, LowRankProduct
from ..maths import Applications, Aux, Maths
from .base import size
from .kron import kron_diag, kron_grads, kron_low_rank_grads, kron_low_rank_qv, kron_qv, kron_refresh
from .kronecker import Kronecker


def _terms(tensors: Aux, names: str, least: int = 0) -> list[Aux]:
    """{R1, L1, R2, L2} -> [{R, L}, {R, L}], at least so many; names that are missing stay so."""
    count = max((int(name[1:]) for name in tensors), default=0)
    found = range(1, max(count, least) + 1)
    return [{n: tensors[f"{n}{k}"] for n in names if f"{n}{k}" in tensors} for k in found]


def _joined(terms: list[Aux]) -> Aux:
    return {f"{name}{k}": t for k, term in enumerate(terms, 1) for name, t in term.items()}


def _sumkron_pairs(aux: Aux, cache: Aux) -> list[tuple[Aux, Aux]]:
    terms = _terms(aux, "RL", len(_terms(cache, "PS")))  # factors whose products are formed may be missing
    return list(zip(terms, _terms(cache, "PS", len(terms)), strict=True))


def sumkron_refresh(aux: Aux, applications: Applications, known: Aux, memory: Aux) -> Aux:
    pairs = zip(_sumkron_pairs(aux, known), _sumkron_pairs(aux, memory), strict=True)
    return _joined([kron_refresh(term, applications, c, old) for (term, c), (_, old) in pairs])


def sumkron_low_rank_qv(aux: Aux, cache: Aux, u: LowRank) -> LowRankProduct:
    terms = [kron_low_rank_qv(a, c, u) for a, c in _sumkron_pairs(aux, cache)]
    halves = tuple(half for t in terms for half in t.halves)
    return LowRankProduct(torch.cat([t.E for t in terms]), torch.cat([t.H for t in terms]), halves)


def sumkron_low_rank_grads(aux: Aux, u: LowRank, v: LowRankProduct, w: DenseAndLowRank) -> Aux:
    terms = _terms(aux, "RL")
    products = [
        LowRankProduct(E, H, v.halves[k : k + 1])
        for k, (E, H) in enumerate(zip(v.E.split(u.rank), v.H.split(u.rank), strict=True))
    ]
    return _joined([kron_low_rank_grads(a, u, product, w) for a, product in zip(terms, products, strict=True)])


def sumkron_qv(aux: Aux, cache: Aux, u: Tensor) -> Tensor:
    first, *rest = (kron_qv(a, c, u) for a, c in _sumkron_pairs(aux, cache))
    for v in rest:
        first = first + v
    return first


def sumkron_grads(aux: Aux, cache: Aux, u: Tensor, w: Tensor) -> Aux:
    return _joined([kron_grads(a, c, u, w) for a, c in _sumkron_pairs(aux, cache)])


def sumkron_diag(aux: Aux, cache: Aux, m: int, n: int) -> Tensor:
    first, *rest = (kron_diag(a, c, m, n) for a, c in _sumkron_pairs(aux, cache))
    for d in rest:
        first = first + d
    return first


SUMKRON = Maths(sumkron_refresh, sumkron_qv, sumkron_grads, sumkron_diag, sumkron_low_rank_qv, sumkron_low_rank_grads)


class SumKron(Kronecker):
    """Sum of block Kroneckers: Q u = Σₖ Pₖ u Sₖ, k = 1 … ``terms``, with λ named R1, L1, R2, L2, ...

    Both starts are exact: term k takes the share wₖ of each column, Lₖ = L diag(√wₖ) with Σₖ wₖ = 1. The shares differ
    from term to term, since equal terms would have equal gradients and stay equal. Other arguments as for
    :class:`Kron`.
    """

    maths = SUMKRON

    def __init__(
        self,
        m: int,
        n: int,
        terms: int = 2,
        *,
        diagonal: Collection[str] = (),
        max_factor_size: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(m, n, diagonal=diagonal, max_factor_size=max_factor_size, dtype=dtype, device=device)
        self.terms = size("terms", terms, least=1)
        for k in range(1, terms + 1):
            self.fishleg_aux[f"R{k}"], self.fishleg_aux[f"L{k}"] = self._factors()
        self.start_sgd()

    def _with_factors(self, R: Tensor, L: Tensor) -> Aux:
        aux: Aux = {}
        for k in range(self.terms):
            share = L.new_full(L.shape[-1:], 0.5 / self.terms)
            share[k :: self.terms] += 0.5
            aux |= {f"R{k + 1}": R, f"L{k + 1}": L * share.sqrt()}
        return aux
