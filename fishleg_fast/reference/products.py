"""Q·u, the λ-gradients of ⟨w, Q u⟩ and the cached products, one set of functions per structure.

Letters follow the paper: λ is ``aux`` = {R, L, A, B, d}; P = RᵀR and S = LLᵀ are ``cache``, each only where it was
worth forming. u, w are (m, n), u in some functions as a thin product EᵀH.
Every gradient is closed form; DESIGN's table lists them, and tests check each against float64 autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .factors import compose, cross, diagonal, mul, rmul, transpose, twice_symmetric
from .thin import Image, Sum, Thin, forms, outer_pays

Aux = dict[str, Tensor]
Vectors = tuple[int, int] | None  # how many columns P, and rows S, is going to be applied to; None: unknown


class Maths(NamedTuple):
    """What one structure computes."""

    refresh: Callable[[Aux, Vectors, Aux, Aux], Aux]  # λ, how often it will be used, known, memory to use -> cache
    qv: Callable[[Aux, Aux, Tensor], Tensor]  # λ, cache, u -> Q u
    grads: Callable[[Aux, Aux, Tensor, Tensor], Aux]  # λ, cache, u, w -> {name: ∂⟨w, Q u⟩/∂λ}
    diag: Callable[[Aux, Aux, int, int], Tensor]  # λ, cache, m, n -> diagonal of Q, as (m, n)
    thin_qv: Callable[[Aux, Aux, Thin], Image] | None = None  # the same for thin u, where Q u is thin then
    thin_grads: Callable[[Aux, Thin, Image, Sum], Aux] | None = None  # λ, u, Q u, w -> ...


# Kron: Q u = A∘(P (A∘u) S), A optional


def kron_refresh(aux: Aux, vectors: Vectors, known: Aux, memory: Aux) -> Aux:
    R, L = aux["R"], aux["L"]
    columns, rows = vectors or (None, None)
    cache = dict(known)
    if "P" not in known and forms(R, columns):
        cache["P"] = compose(transpose(R), R, memory.get("P"))
    if "S" not in known and forms(L, rows):
        cache["S"] = compose(L, transpose(L), memory.get("S"))
    return cache


def _left(aux: Aux, cache: Aux, x: Tensor) -> Tensor:
    """P x."""
    return mul(cache["P"], x) if "P" in cache else mul(transpose(aux["R"]), mul(aux["R"], x))


def _right(aux: Aux, cache: Aux, x: Tensor) -> Tensor:
    """x S."""
    return rmul(x, cache["S"]) if "S" in cache else rmul(rmul(x, aux["L"]), transpose(aux["L"]))


def kron_qv(aux: Aux, cache: Aux, u: Tensor) -> Tensor:
    A = aux.get("A")
    v = _right(aux, cache, _left(aux, cache, u if A is None else A * u))
    return v if A is None else A * v


def kron_grads(aux: Aux, cache: Aux, u: Tensor, w: Tensor) -> Aux:
    """dL = (M+Mᵀ)L, dR = R(N+Nᵀ), with M = uᵀPw and N = wSuᵀ."""
    R, L, A = aux["R"], aux["L"], aux.get("A")
    x, y = (u, w) if A is None else (A * u, A * w)
    Py, yS = _left(aux, cache, y), _right(aux, cache, y)
    M = cross(x.T, Py.T, L)
    N = cross(yS, x, R)
    grads = {"R": compose(R, twice_symmetric(N)), "L": compose(twice_symmetric(M), L)}
    if A is not None:
        grads["A"] = w * _right(aux, cache, _left(aux, cache, x)) + u * _right(aux, cache, Py)
    return grads


def kron_diag(aux: Aux, cache: Aux, m: int, n: int) -> Tensor:
    A = aux.get("A")
    d = diagonal(cache["P"], m)[:, None] * diagonal(cache["S"], n)
    return d if A is None else A * d * A


def kron_thin_qv(aux: Aux, cache: Aux, u: Thin) -> Image:
    """(E P)ᵀ(H S); without A, since A∘(EᵀH) is not thin."""
    R, L = aux["R"], aux["L"]
    ER = None if "P" in cache else rmul(u.E, transpose(R))
    HL = None if "S" in cache else rmul(u.H, L)
    EP = rmul(u.E, cache["P"]) if ER is None else rmul(ER, R)
    HS = rmul(u.H, cache["S"]) if HL is None else rmul(HL, transpose(L))
    return Image(EP, HS, ((ER, HL),))


def kron_thin_grads(aux: Aux, u: Thin, v: Image, w: Sum) -> Aux:
    """M and N have rank r: no product of two factors' size is needed."""
    R, L, E, H = aux["R"], aux["L"], u.E, u.H
    ER, HL = v.halves[0] if v.halves else (None, None)
    y = w.left(v.E)  # M = Hᵀy, y = E P w
    z = w.right(v.H)  # N = zᵀE, z = H S wᵀ
    if outer_pays(L, u.rank):
        dL = torch.cat([H, y]).T @ torch.cat([y @ L, H @ L if HL is None else HL])
    else:
        dL = compose(twice_symmetric(cross(H.T, y.T, L)), L)
    if outer_pays(R, u.rank):
        dR = torch.cat([E @ R.T if ER is None else ER, z @ R.T]).T @ torch.cat([z, E])
    else:
        dR = compose(R, twice_symmetric(cross(z.T, E.T, R)))
    return {"R": dR, "L": dL}


# DiagKron: Q u = A∘(Rᵀ (B²∘(R (A∘u) L)) Lᵀ)


def no_cache(aux: Aux, vectors: Vectors, known: Aux, memory: Aux) -> Aux:
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
    """{R1, L1, R2, L2} -> [{R, L}, {R, L}]; names that are missing stay so."""
    count = max((int(name[1:]) for name in tensors), default=0)
    return [{n: tensors[f"{n}{k}"] for n in names if f"{n}{k}" in tensors} for k in range(1, count + 1)]


def _joined(terms: list[Aux]) -> Aux:
    return {f"{name}{k}": t for k, term in enumerate(terms, 1) for name, t in term.items()}


def _sumkron_pairs(aux: Aux, cache: Aux) -> list[tuple[Aux, Aux]]:
    terms, formed = _terms(aux, "RL"), _terms(cache, "PS")
    return list(zip(terms, formed + [{}] * (len(terms) - len(formed)), strict=True))


def sumkron_refresh(aux: Aux, vectors: Vectors, known: Aux, memory: Aux) -> Aux:
    pairs = zip(_sumkron_pairs(aux, known), _sumkron_pairs(aux, memory), strict=True)
    return _joined([kron_refresh(term, vectors, c, old) for (term, c), (_, old) in pairs])


def sumkron_thin_qv(aux: Aux, cache: Aux, u: Thin) -> Image:
    terms = [kron_thin_qv(a, c, u) for a, c in _sumkron_pairs(aux, cache)]
    halves = tuple(half for t in terms for half in t.halves)
    return Image(torch.cat([t.E for t in terms]), torch.cat([t.H for t in terms]), halves)


def sumkron_thin_grads(aux: Aux, u: Thin, v: Image, w: Sum) -> Aux:
    terms = _terms(aux, "RL")
    images = [
        Image(E, H, v.halves[k : k + 1])
        for k, (E, H) in enumerate(zip(v.E.split(u.rank), v.H.split(u.rank), strict=True))
    ]
    return _joined([kron_thin_grads(a, u, image, w) for a, image in zip(terms, images, strict=True)])


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
    "kron": Maths(kron_refresh, kron_qv, kron_grads, kron_diag, kron_thin_qv, kron_thin_grads),
    "kron-scaled": Maths(kron_refresh, kron_qv, kron_grads, kron_diag),
    "diagkron": Maths(no_cache, diagkron_qv, diagkron_grads, diagkron_diag),
    "sumkron": Maths(sumkron_refresh, sumkron_qv, sumkron_grads, sumkron_diag, sumkron_thin_qv, sumkron_thin_grads),
    "diagonal": Maths(no_cache, diagonal_qv, diagonal_grads, diagonal_diag),
}
