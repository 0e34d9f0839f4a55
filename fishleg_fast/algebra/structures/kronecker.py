"""What structures of Kronecker factors share: factors R (rows) and L (columns), their layouts and their two starts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..costs import low_rank_pays
from ..factors import cross, describe, diagonal, inverse_root, mul, rmul, spread, trace, transpose
from ..low_rank import LowRank
from ..maths import Aux
from ..matrix import Matrix, dense, widest
from .base import LayerStatistics, Structure, float_dtype, size


def _new_factor(side: str, k: int, diagonal: Collection[str], max_factor_size: int | None, options: dict) -> Tensor:
    """A zeroed factor for one side of a block: dense, diagonal, or block-diagonal where it would outgrow the limit."""
    if side in diagonal:
        return torch.zeros(k, **options)
    if max_factor_size is None or k <= max_factor_size:
        return torch.zeros(k, k, **options)
    count = -(-k // max_factor_size)
    width = -(-k // count)
    return torch.zeros(count, width, width, **options)


def _set_identity(factor: Tensor, value: float = 1.0) -> None:
    if factor.ndim == 1:
        factor.fill_(value)
    else:
        factor.zero_().diagonal(dim1=-2, dim2=-1).fill_(value)


class Kronecker(Structure):
    """What Kron, DiagKron and SumKron share: factors R (rows) and L (columns), and how they start."""

    moments = ("rows", "columns")

    def __init__(
        self,
        m: int,
        n: int,
        *,
        diagonal: Collection[str],
        max_factor_size: int | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        super().__init__((m, n))
        if not set(diagonal) <= {"R", "L"}:
            raise ValueError(f"diagonal should name factors, 'R' or 'L', but is: {diagonal!r}")
        if max_factor_size is not None:
            size("max_factor_size", max_factor_size, least=1)
        self._options: dict[str, Any] = {"dtype": float_dtype(dtype), "device": device}
        self._layout = (diagonal, max_factor_size, self._options)

    def _factors(self) -> tuple[Tensor, Tensor]:
        m, n = self.shape
        return _new_factor("R", m, *self._layout), _new_factor("L", n, *self._layout)

    def layout(self) -> dict[str, str]:
        """As above."""
        return {name: describe(factor) for name, factor in zip("RL", self.fishleg_aux.values(), strict=False)}

    def low_rank_pays(self, rank: int) -> bool:
        """As above, by counts of multiply-adds."""
        (R, L), (m, n) = list(self.fishleg_aux.values())[:2], self.shape
        return low_rank_pays(R, L, m, n, rank)

    def _with_factors(self, R: Tensor, L: Tensor) -> Aux:
        """λ that makes Q = RᵀR ⊗ LLᵀ. All may have a dimension in front."""
        aux = {"R": R, "L": L}
        front = R.shape[: R.ndim - self.fishleg_aux["R"].ndim]
        for name in ("A", "B"):
            if name in self.fishleg_aux:
                aux[name] = R.new_ones(()).expand(*front, *self.shape)
        return aux

    @torch.no_grad()
    def _start_sgd(self, scale: float) -> None:
        R, L = self._factors()
        for factor in (R, L):
            _set_identity(factor, scale**0.25)
        for name, value in self._with_factors(R, L).items():
            self.fishleg_aux[name].copy_(value)

    def new_moments(self) -> Aux:
        return dict(zip(self.moments, self._factors(), strict=True))

    @torch.no_grad()
    def gradient_moments(self, grads: Sequence[Tensor]) -> Aux:
        """E[GGᵀ] and E[GᵀG], each over the square root of their common trace, so that rows ⊗ columns has F's trace."""
        R, L = list(self.fishleg_aux.values())[:2]  # their layouts
        rows = reduce(torch.add, (cross(g, g, R) for g in grads)) / len(grads)
        columns = reduce(torch.add, (cross(g.T, g.T, L) for g in grads)) / len(grads)
        root = trace(rows).sqrt().clamp_min(torch.finfo(rows.dtype).tiny)
        return {"rows": rows / root, "columns": columns / root}

    @torch.no_grad()
    def layer_moments(self, a: Tensor, e: Tensor, count: float, positions: int | None = None) -> Aux:
        """rows = count·Σ e eᵀ, columns = mean a aᵀ (Martens & Grosse 2015; for convolutions Grosse & Martens 2016)."""
        R, L = list(self.fishleg_aux.values())[:2]  # their layouts
        e, a = e * count**0.5, a / max(positions or a.shape[0], 1) ** 0.5
        return {"rows": cross(e.T, e.T, R), "columns": cross(a.T, a.T, L)}

    @torch.no_grad()
    def mean_eigenvalue(self, moments: Aux, weight: float = 1.0) -> Tensor:
        """(tr G/m)(tr Ā/n)."""
        means = [trace(moments[name]) / weight / max(k, 1) for name, k in zip(self.moments, self.shape, strict=True)]
        return means[0] * means[1]

    @torch.no_grad()
    def fisher_product(self, moments: Aux, weight: Tensor | float, v: Matrix) -> Matrix:
        """G v Ā."""
        G, A = moments["rows"], moments["columns"]
        if isinstance(v, LowRank):
            return LowRank(rmul(v.E, G) / weight, rmul(v.H, A) / weight)
        return rmul(mul(G, dense(v)), A) / weight**2

    @torch.no_grad()
    def average(self, moments: Aux, new: LayerStatistics | Aux, weight: float, decay: float) -> bool:
        """As any structure's; of dense factors within the product that makes the new ones."""
        rows, columns = moments["rows"], moments["columns"]
        if not isinstance(new, LayerStatistics) or rows.ndim != 2 or columns.ndim != 2:
            return super().average(moments, new, weight, decay)
        a, e, count, positions = new
        alphas = weight * count, weight / max(positions or a.shape[0], 1)
        sizes = torch.stack([torch.linalg.vector_norm(x).square() * c for x, c in zip((e, a), alphas, strict=True)])
        if not torch.isfinite(sizes).all():  # the traces of what is added
            return False
        rows.addmm_(e.T, e, beta=decay, alpha=alphas[0])
        columns.addmm_(a.T, a, beta=decay, alpha=alphas[1])
        return True

    @torch.no_grad()
    def kfac_start(
        self, moments: Aux, damping: float, weight: Tensor | float = 1.0, floor: float = 0.0
    ) -> tuple[Aux, Tensor] | None:
        """(G + √γ/π I)⁻¹ = RᵀR and (Ā + π√γ I)⁻¹ = LLᵀ, π² = (tr Ā/n)/(tr G/m) (Martens & Grosse 2015, section 6.3).

        ``moments``: "rows" G and "columns" Ā, laid out as R and L; their Kronecker product estimates the Fisher matrix.
        """
        G, A = moments["rows"], moments["columns"]
        (m, n), batch = self.shape, G.ndim - next(iter(self.fishleg_aux.values())).ndim
        if m == 0 or n == 0:
            return None
        tiny = torch.finfo(G.dtype).tiny
        means = [trace(F, batch) / weight / k for F, k in ((G, m), (A, n))]
        mean_g, mean_a = (mean.clamp_min(tiny) for mean in means)
        pi = mean_a.sqrt() / mean_g.sqrt()  # the quotient may overflow
        R, right = inverse_root(G, damping**0.5 / pi + floor * mean_g, weight)
        L, left = inverse_root(A, damping**0.5 * pi + floor * mean_a, weight)
        R, L = self._balanced(R, transpose(L, batch), batch)
        return self._with_factors(R, L), right & left & torch.isfinite(means[0] + means[1])

    def _balanced(self, R: Tensor, L: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """cR and L/c, of which Q is the same. Adam's steps on λ are absolute, so both get one size: where G vanishes,
        below a layer that starts at zero, π puts twenty orders of magnitude between them.
        """
        sizes = [
            torch.linalg.vector_norm(diagonal(F, k, batch), dim=-1, dtype=widest(F.device)) / k**0.5
            for F, k in zip((R, L), self.shape, strict=True)
        ]
        c = (sizes[1] / sizes[0]).sqrt().to(R.dtype)
        return R * spread(c, R), L / spread(c, L)
