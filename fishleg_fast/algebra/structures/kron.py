"""Block Kronecker: Q u = P u S, or A∘(P (A∘u) S) with an outer diagonal A."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..costs import forming_pays, outer_products_pay
from ..factors import compose, cross, diagonal, divided, mul, rmul, transpose, twice_symmetric
from ..low_rank import DenseAndLowRank, LowRank, LowRankProduct
from ..maths import Applications, Aux, Maths
from ..natural import natural_step
from .kronecker import Kronecker


def kron_refresh(aux: Aux, applications: Applications, known: Aux, memory: Aux) -> Aux:
    R, L = aux["R"], aux["L"]
    columns, rows = applications or (None, None)
    cache = dict(known)
    if "P" not in known and forming_pays(R, columns):
        cache["P"] = compose(transpose(R), R, memory.get("P"))
    if "S" not in known and forming_pays(L, rows):
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


def kron_low_rank_qv(aux: Aux, cache: Aux, u: LowRank) -> LowRankProduct:
    """(E P)ᵀ(H S); without A, since A∘(EᵀH) is not low-rank."""
    R, L = aux["R"], aux["L"]
    ER = None if "P" in cache else rmul(u.E, transpose(R))
    HL = None if "S" in cache else rmul(u.H, L)
    EP = rmul(u.E, cache["P"]) if ER is None else rmul(ER, R)
    HS = rmul(u.H, cache["S"]) if HL is None else rmul(HL, transpose(L))
    return LowRankProduct(EP, HS, ((ER, HL),))


def kron_low_rank_grads(aux: Aux, u: LowRank, v: LowRankProduct, w: DenseAndLowRank) -> Aux:
    """M and N have rank r: no product of two factors' size is needed."""
    R, L, E, H = aux["R"], aux["L"], u.E, u.H
    ER, HL = v.halves[0] if v.halves else (None, None)
    y = w.left(v.E)  # M = Hᵀy, y = E P w
    z = w.right(v.H)  # N = zᵀE, z = H S wᵀ
    if outer_products_pay(L, u.rank):
        dL = torch.cat([H, y]).T @ torch.cat([y @ L, H @ L if HL is None else HL])
    else:
        dL = compose(twice_symmetric(cross(H.T, y.T, L)), L)
    if outer_products_pay(R, u.rank):
        dR = torch.cat([E @ R.T if ER is None else ER, z @ R.T]).T @ torch.cat([z, E])
    else:
        dR = compose(R, twice_symmetric(cross(z.T, E.T, R)))
    return {"R": dR, "L": dL}


KRON = Maths(kron_refresh, kron_qv, kron_grads, kron_diag, kron_low_rank_qv, kron_low_rank_grads)
KRON_SCALED = Maths(kron_refresh, kron_qv, kron_grads, kron_diag)  # with A, under which Q u has full rank


class Kron(Kronecker):
    """Block Kronecker: Q u = A∘(P (A∘u) S), with P = RᵀR, S = LLᵀ, and A only where ``scale``.

    Args:
        m, n: the block's shape.
        scale: an outer diagonal A (m, n) besides.
        diagonal: the factors to keep diagonal: any of "R" (m,), "L" (n,).
        max_factor_size: a larger factor becomes block-diagonal, with blocks of at most this size.
        dtype: of λ: torch.float32 or torch.float64; the default dtype if None.
        device: of λ.
    """

    maths = KRON

    def __init__(
        self,
        m: int,
        n: int,
        scale: bool = False,
        *,
        diagonal: Collection[str] = (),
        max_factor_size: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(m, n, diagonal=diagonal, max_factor_size=max_factor_size, dtype=dtype, device=device)
        R, L = self._factors()
        self.fishleg_aux = {"R": R, "L": L}
        if scale:
            self.maths = KRON_SCALED
            self.fishleg_aux["A"] = torch.ones(m, n, **self._options)
        self.start_sgd()

    def natural_update(
        self, aux: Aux, moments: Aux, damping: float, rate: Tensor, weight: Tensor | float = 1.0
    ) -> tuple[Aux, Tensor]:
        """R, and then L with that (``algebra.natural``); not with A, of which the average has no such form."""
        if "A" in aux:
            return super().natural_update(aux, moments, damping, rate, weight)
        batch, (m, n) = rate.ndim, self.shape
        if m == 0 or n == 0:
            return aux, torch.ones(rate.shape, dtype=torch.bool, device=rate.device)
        G, A = (divided(t, weight) for t in moments.values())
        R, right = natural_step(aux["R"], G, transpose(aux["L"], batch), A, (m, n), damping, rate)
        L, left = natural_step(transpose(aux["L"], batch), A, R, G, (n, m), damping, rate)
        R, L = self._balanced(R, transpose(L, batch), batch)
        return {"R": R, "L": L}, right & left
