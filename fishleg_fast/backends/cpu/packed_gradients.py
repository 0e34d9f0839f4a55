"""λ-gradients of Kron blocks by packed products, left as the products that Adam's pass multiplies out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...algebra.low_rank import LowRank, LowRankProduct
from ...algebra.matrix import Matrix, dense, dot
from ...model.block import Block
from .packed_matrix import LEFT, MATRIX_UNITS, RIGHT, PackedMatrix, ProductBatch, padded
from .packed_operator import PackedOperator
from .packed_products import row_major_like
from .state import packed_operator

PackedGradient = tuple[PackedMatrix, PackedMatrix]  # a λ-gradient, as the product of these


class LowRankTerms:
    """One block's low-rank u and v = Q u, and F v: the products that both 𝒜 and its gradient take."""

    def __init__(self, u: LowRank, v: LowRankProduct, fv: Matrix) -> None:
        self.u, self.v, self._fv = u, v, fv
        self._terms = (fv, v, u) if isinstance(fv, LowRank) else (v, u)
        self._products = [(v.E @ t.E.T, v.H @ t.H.T) for t in self._terms]

    def dots(self) -> Tensor:
        """⟨v, F v⟩, ⟨v, v⟩ and ⟨u, v⟩: (3,)"""
        found = [torch.sum(x * y) for x, y in self._products]
        return torch.stack(found if len(found) == 3 else [dot(self.v, self._fv), *found])

    def residual(self, damping: float, scale: float) -> tuple[Tensor, Tensor]:
        """y = E P w (r, n) and z = H S wᵀ (r, m), of w = α(F+γI)v − u."""
        if isinstance(self._fv, LowRank):
            y, z = torch.zeros_like(self.v.H), torch.zeros_like(self.u.E)
        else:
            fv = dense(self._fv) * scale
            y, z = self.v.E @ fv, self.v.H @ fv.T
        weights = (scale, scale * damping, -1.0)[-len(self._terms) :]
        for t, (left, right), c in zip(self._terms, self._products, weights, strict=True):
            y.addmm_(left, t.H, alpha=c)
            z.addmm_(right, t.E, alpha=c)
        return y, z


def packed_gradients(
    blocks: Sequence[Block], us: Sequence[Matrix | LowRankTerms], ws: Sequence[Tensor | tuple[Tensor, Tensor]]
) -> list[dict[str, PackedGradient]]:
    """∂⟨w, Q u⟩/∂λ of each block, as ``algebra`` has them.

    Of a dense u or, with y = E P w and z = H S wᵀ in the place of w, of low-rank ones.
    """
    if not blocks:
        return []
    batch = ProductBatch(packed_operator(blocks[0]).engine)
    finish = []
    for block, u, w in zip(blocks, us, ws, strict=True):
        if isinstance(u, LowRankTerms):
            assert not isinstance(w, Tensor)
            finish.append(_low_rank_gradient(packed_operator(block), batch, u, *w))
        else:
            assert isinstance(w, Tensor)
            finish.append(_dense_gradient(packed_operator(block), batch, dense(u), w))
    batch.run()
    found = [f(batch) for f in finish]
    batch.run()
    return found


def _low_rank_gradient(
    p: PackedOperator, batch: ProductBatch, terms: LowRankTerms, y: Tensor, z: Tensor
) -> Callable[[ProductBatch], dict[str, PackedGradient]]:
    """dL = [H; y]ᵀ[yL; HL] and dR = [ERᵀ, zRᵀ]ᵀ[z; E]."""
    u, r = terms.u, terms.u.rank
    (ER, HL), *_ = terms.v.halves
    assert ER is not None and HL is not None
    if p.engine in MATRIX_UNITS:
        Rz, yL = y.new_empty(p.m, r), y.new_empty(r, p.n)
        batch.multiply(p.factor(batch, "R", LEFT), batch.pack(z.T, p.scratch("E", RIGHT, p.m, r)), Rz)
        batch.multiply(batch.pack(y, p.scratch("H", LEFT, r, p.n)), p.factor(batch, "L", RIGHT), yL)
    else:
        R, L = p.structure.fishleg_aux["R"], p.structure.fishleg_aux["L"]
        Rz, yL = R @ z.T, y @ L

    def finish(batch: ProductBatch) -> dict[str, PackedGradient]:
        half = padded(p.engine, r)
        grads = {}
        for name, k, xs, ys in (("R", p.m, (ER, Rz.T), (z, u.E)), ("L", p.n, (u.H, y), (yL, HL))):
            left, right = p.scratch("d" + name, LEFT, k, half + r), p.scratch("d" + name, RIGHT, half + r, k)
            for after, x, other in zip((0, half), xs, ys, strict=True):
                batch.pack(x.T, left, after)
                batch.pack(other, right, after)
            grads[name] = left, right
        return grads

    return finish


def _dense_gradient(
    p: PackedOperator, batch: ProductBatch, u: Tensor, w: Tensor
) -> Callable[[ProductBatch], dict[str, PackedGradient]]:
    """dL = (M+Mᵀ)L and dR = R(N+Nᵀ), with M+Mᵀ = [u; Pw]ᵀ[Pw; u] and N+Nᵀ = [wS, u][u, wS]ᵀ."""
    Pw, wS = row_major_like(w), row_major_like(w)
    if p.stale:
        p.form(batch)
        batch.run()
    batch.multiply(p.P, batch.pack(w, p.scratch("u", RIGHT, p.m, p.n)), Pw)
    batch.multiply(batch.pack(w, p.scratch("u", LEFT, p.m, p.n)), p.S, wS)

    def finish(batch: ProductBatch) -> dict[str, PackedGradient]:
        M, N = p.scratch("dense M", LEFT, p.n, p.n), p.scratch("dense N", RIGHT, p.m, p.m)
        for name, out, k, depth, xs in (("L", M, p.n, p.m, (u.T, Pw.T)), ("R", N, p.m, p.n, (wS, u))):
            half = padded(p.engine, depth)
            name = f"dense {name}"
            left, right = p.scratch(name, LEFT, k, half + depth), p.scratch(name, RIGHT, half + depth, k)
            for after, x, other in zip((0, half), xs, xs[::-1], strict=True):
                batch.pack(x, left, after)
                batch.pack(other.T, right, after)
            batch.multiply(left, right, out, symmetric=True)
        return {"R": (p.factor(batch, "R", LEFT), N), "L": (M, p.factor(batch, "L", RIGHT))}

    return finish


def forget(blocks: Sequence[Block]) -> None:
    """Free what the λ-gradients of dense u were made of."""
    for block in blocks:
        packed_operator(block).forget()
