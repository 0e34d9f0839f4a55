"""Q·u, the λ-gradients of ⟨w, Q u⟩ and the cached products, one set of functions per structure.

Letters follow the paper: λ is ``aux`` = {R, L, A, B, d}; P = RᵀR and S = LLᵀ are ``cache``. u, w are (m, n).
Every gradient is closed form; DESIGN's table lists them, and tests check each against float64 autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .factors import compose, cross, diagonal, mul, rmul, transpose, twice_symmetric

Aux = dict[str, Tensor]


class Maths(NamedTuple):
    """What one structure computes."""

    refresh: Callable[[Aux], Aux]  # λ -> cache
    qv: Callable[[Aux, Aux, Tensor], Tensor]  # λ, cache, u -> Q u
    grads: Callable[[Aux, Aux, Tensor, Tensor], Aux]  # λ, cache, u, w -> {name: ∂⟨w, Q u⟩/∂λ}
    diag: Callable[[Aux, Aux, int, int], Tensor]  # λ, cache, m, n -> diagonal of Q, as (m, n)


# Kron: Q u = A∘(P (A∘u) S), A optional


def kron_refresh(aux: Aux) -> Aux:
    R, L = aux["R"], aux["L"]
    return {"P": compose(transpose(R), R), "S": compose(L, transpose(L))}


def kron_qv(aux: Aux, cache: Aux, u: Tensor) -> Tensor:
    A = aux.get("A")
    v = rmul(mul(cache["P"], u if A is None else A * u), cache["S"])
    return v if A is None else A * v


def kron_grads(aux: Aux, cache: Aux, u: Tensor, w: Tensor) -> Aux:
    R, L, A = aux["R"], aux["L"], aux.get("A")
    P, S = cache["P"], cache["S"]
    x, y = (u, w) if A is None else (A * u, A * w)
    Py, yS = mul(P, y), rmul(y, S)
    M = cross(x.T, Py.T, L)  # xᵀ P y
    N = cross(yS, x, R)  # y S xᵀ
    grads = {"R": compose(R, twice_symmetric(N)), "L": compose(twice_symmetric(M), L)}
    if A is not None:
        grads["A"] = w * rmul(mul(P, x), S) + u * rmul(Py, S)
    return grads


def kron_diag(aux: Aux, cache: Aux, m: int, n: int) -> Tensor:
    A = aux.get("A")
    d = diagonal(cache["P"], m)[:, None] * diagonal(cache["S"], n)
    return d if A is None else A * d * A


# DiagKron: Q u = A∘(Rᵀ (B²∘(R (A∘u) L)) Lᵀ)


def _no_cache(aux: Aux) -> Aux:
    return {}


def diagkron_qv(aux: Aux, cache: Aux, u: Tensor) -> Tensor:
    R, L, A, B = aux["R"], aux["L"], aux["A"], aux["B"]
    inner = B * B * rmul(mul(R, A * u), L)
    return A * rmul(mul(transpose(R), inner), transpose(L))


def diagkron_grads(aux: Aux, cache: Aux, u: Tensor, w: Tensor) -> Aux:
    R, L, A, B = aux["R"], aux["L"], aux["A"], aux["B"]
    Rt, Lt = transpose(R), transpose(L)
    X0, Y0 = A * u, A * w
    RX0, RY0 = mul(R, X0), mul(R, Y0)
    X1, Y1 = rmul(RX0, L), rmul(RY0, L)
    X2, Y2 = B * B * X1, B * B * Y1
    X3, Y3 = rmul(mul(Rt, X2), Lt), rmul(mul(Rt, Y2), Lt)
    return {
        "R": cross(Y2, rmul(X0, L), R) + cross(X2, rmul(Y0, L), R),
        "L": cross(RX0.T, Y2.T, L) + cross(RY0.T, X2.T, L),
        "A": w * X3 + u * Y3,
        "B": 2 * B * X1 * Y1,
    }


def diagkron_diag(aux: Aux, cache: Aux, m: int, n: int) -> Tensor:
    R, L, A, B = aux["R"], aux["L"], aux["A"], aux["B"]
    return A * rmul(mul(transpose(R * R), B * B), transpose(L * L)) * A


# SumKron: Q u = Σₖ Pₖ u Sₖ


def _terms(tensors: Aux, names: str) -> list[Aux]:
    """{R1, L1, R2, L2} -> [{R, L}, {R, L}]"""
    count = len(tensors) // len(names)
    return [{name: tensors[f"{name}{k}"] for name in names} for k in range(1, count + 1)]


def _joined(terms: list[Aux]) -> Aux:
    return {f"{name}{k}": t for k, term in enumerate(terms, 1) for name, t in term.items()}


def _sumkron_pairs(aux: Aux, cache: Aux) -> list[tuple[Aux, Aux]]:
    return list(zip(_terms(aux, "RL"), _terms(cache, "PS"), strict=True))


def sumkron_refresh(aux: Aux) -> Aux:
    return _joined([kron_refresh(term) for term in _terms(aux, "RL")])


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


# Diagonal: Q u = d²∘u


def diagonal_qv(aux: Aux, cache: Aux, u: Tensor) -> Tensor:
    d = aux["d"]
    return d * d * u


def diagonal_grads(aux: Aux, cache: Aux, u: Tensor, w: Tensor) -> Aux:
    return {"d": 2 * aux["d"] * u * w}


def diagonal_diag(aux: Aux, cache: Aux, m: int, n: int) -> Tensor:
    return aux["d"] * aux["d"]


MATHS = {
    "kron": Maths(kron_refresh, kron_qv, kron_grads, kron_diag),
    "diagkron": Maths(_no_cache, diagkron_qv, diagkron_grads, diagkron_diag),
    "sumkron": Maths(sumkron_refresh, sumkron_qv, sumkron_grads, sumkron_diag),
    "diagonal": Maths(_no_cache, diagonal_qv, diagonal_grads, diagonal_diag),
}
