"""Block Kronecker with diagonals: Q u = A∘(Rᵀ (B²∘(R (A∘u) L)) Lᵀ)."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..factors import cross, mul, rmul, transpose
from ..maths import Aux, Maths, no_cache
from .kronecker import Kronecker


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


DIAGKRON = Maths(no_cache, diagkron_qv, diagkron_grads, diagkron_diag)


class DiagKron(Kronecker):
    """Block Kronecker with diagonals: Q u = A∘(Rᵀ (B²∘(R (A∘u) L)) Lᵀ), with A, B (m, n).

    As a matrix over row-major vec(u): A (Rᵀ⊗L) B² (R⊗Lᵀ) A. The talk's A (R⊗L) B² (Rᵀ⊗Lᵀ) A, whose R is our Rᵀ.

    Arguments as for :class:`Kron`.
    """

    maths = DIAGKRON

    def __init__(
        self,
        m: int,
        n: int,
        *,
        diagonal: Collection[str] = (),
        max_factor_size: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(m, n, diagonal=diagonal, max_factor_size=max_factor_size, dtype=dtype, device=device)
        R, L = self._factors()
        A, B = torch.ones(m, n, **self._options), torch.ones(m, n, **self._options)
        self.fishleg_aux = {"R": R, "L": L, "A": A, "B": B}
        self.start_sgd()
