"""Structured inverse Fisher matrices: the shapes of λ and its two starts. The maths is in ``fishleg_fast.reference``.

A structure approximates the inverse Fisher matrix Q of one block, the parameters θ of a layer seen as a matrix (m, n).
Row-major vec throughout: vec(X u Y) = (X ⊗ Yᵀ) vec(u). λ is ``fishleg_aux``, with the letters of the paper:

    Kron      Q u = A∘(P (A∘u) S), P = RᵀR, S = LLᵀ     R (m, m), L (n, n), A (m, n) where scale=True
    DiagKron  Q u = A∘(Rᵀ (B²∘(R (A∘u) L)) Lᵀ)          R (m, m), L (n, n), A (m, n), B (m, n)
    SumKron   Q u = Σₖ Pₖ u Sₖ                          R1 (m, m), L1 (n, n), R2, L2, ...
    Diagonal  Q u = d²∘u                                d, of the block's shape

Source: Garcia, Freddi et al., Fisher-Legendre (FishLeg) optimization of deep neural networks, ICLR 2023.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference.factors import cross, diagonal, inverse_root, trace, transpose
from .reference.products import MATHS, Aux, Maths, Vectors
from .reference.thin import Image, Sum, Thin

Version = tuple[tuple[int, int], ...]


def _size(name: str, value: int, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} should be an integer of at least {least} but is: {value!r}")
    return value


def _float_dtype(dtype: torch.dtype | None) -> torch.dtype:
    dtype = dtype or torch.get_default_dtype()
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype should be torch.float32 or torch.float64 (λ needs the precision) but is: {dtype}")
    return dtype


def finite(moments: Aux) -> bool:
    """Whether second moments are finite: those of a positive semi-definite matrix are where its trace is."""
    return all(torch.isfinite(t.sum() if name == "diagonal" else trace(t)) for name, t in moments.items())


def _refuse_non_finite(moments: Aux) -> None:
    if not finite(moments):
        raise torch.linalg.LinAlgError(f"moments should be finite but are not: {sorted(moments)}")


class Shown(NamedTuple):
    """What a layer showed in a pass with drawn labels, the loss being a mean over ``terms`` independent ones."""

    a: Tensor  # (positions, n): inputs
    e: Tensor  # (positions, m): output gradients
    terms: float


class Structure:
    """One block's Q(λ). Subclasses set ``maths`` and fill ``fishleg_aux`` in their constructor.

    Attributes:
        shape: (m, n) of the block.
        fishleg_aux: λ, name -> tensor. May be edited in place; the cached products follow.
    """

    maths: Maths
    moments: tuple[str, ...] = ()  # names of the second moments that ``start_kfac`` reads

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(_size("each size of shape", k) for k in shape)
        self.fishleg_aux: Aux = {}
        self.operands: torch.dtype | None = None  # what operands of matrix products are rounded to; None: λ's dtype
        self._cache: Aux = {}
        self._cache_key: tuple[Version, torch.dtype | None, Vectors] | None = None
        self._rounded: Aux = {}

    @property
    def version(self) -> Version:
        """Changes whenever λ is written to."""
        return tuple((id(t), t._version) for t in self.fishleg_aux.values())

    @property
    def thin(self) -> bool:
        """Whether Q u is a thin matrix where u is one (see ``reference.thin``)."""
        return self.maths.thin_qv is not None

    @property
    def cache(self) -> Aux:
        """What depends on λ alone (P and S of a Kron), recomputed only when λ was written to."""
        if self._cache_key is None or self._cache_key[:2] != (self.version, self.operands):
            self.refresh()
        return self._cache

    @torch.no_grad()
    def refresh(self, vectors: Vectors = None) -> None:
        """Bring the cache up to date with λ, for as much use as ``vectors`` says: products that would not pay for
        themselves are left out, and Q u then takes the factors.
        """
        key = (self.version, self.operands, vectors)
        if self._cache_key == key:
            return
        if self._cache_key is None or self._cache_key[:2] != key[:2]:
            self._cache, self._rounded = {}, {}
        self._cache_key = key
        self._cache = self.maths.refresh(self._factors_as_operands(), vectors, self._cache)

    def _factors_as_operands(self) -> Aux:
        """λ, rounded where products are to be; kept until λ changes."""
        if not self.thin or self.operands is None:  # elementwise products stay at full precision
            return self.fishleg_aux
        if not self._rounded:
            self._rounded = {name: t.to(self.operands) for name, t in self.fishleg_aux.items()}
        return self._rounded

    def product(self, u: Tensor) -> Tensor:
        """Q u in λ's dtype, at the precision of ``operands``."""
        cache, aux = self.cache, self._factors_as_operands()
        narrow = self.operands if self.thin else None
        return self.maths.qv(aux, cache, u.to(narrow or u.dtype)).to(u.dtype)

    def thin_product(self, u: Thin) -> Image:
        """Q u for a thin u, as ``operands`` are."""
        assert self.maths.thin_qv is not None
        cache, aux = self.cache, self._factors_as_operands()
        return self.maths.thin_qv(aux, cache, u.to(self.operands))

    def gradients(self, u: Tensor, w: Tensor) -> Aux:
        """∂⟨w, Q u⟩/∂λ, as ``operands`` are."""
        cache, aux = self.cache, self._factors_as_operands()
        narrow = self.operands if self.thin else None
        return self.maths.grads(aux, cache, u.to(narrow or u.dtype), w.to(narrow or w.dtype))

    def thin_gradients(self, u: Thin, v: Image, w: Sum) -> Aux:
        """The same for a thin u, of which v is ``thin_product``."""
        assert self.maths.thin_grads is not None
        return self.maths.thin_grads(self._factors_as_operands(), u.to(self.operands), v, w.to(self.operands))

    def _check(self, name: str, u: Tensor) -> Tensor:
        if tuple(u.shape) != self.shape:
            raise ValueError(f"{name} should have shape {self.shape} but has: {tuple(u.shape)}")
        dtype = next(iter(self.fishleg_aux.values())).dtype
        if u.dtype != dtype:
            raise TypeError(f"{name} should have λ's dtype {dtype} but has: {u.dtype}; convert it with .to({dtype})")
        return u

    @torch.no_grad()
    def Qv(self, u: Tensor) -> Tensor:
        """Q(λ) u, for u of the block's shape and λ's dtype. ValueError or TypeError otherwise."""
        return self.product(self._check("u", u))

    @torch.no_grad()
    def aux_grads(self, u: Tensor, w: Tensor) -> Aux:
        """Gradient of s(λ) = ⟨w, Q(λ) u⟩ with u, w constant: a dict with λ's names and shapes."""
        grads = self.gradients(self._check("u", u), self._check("w", w))
        return {name: grad.to(u.dtype) for name, grad in grads.items()}

    @torch.no_grad()
    def diag(self) -> Tensor:
        """The diagonal of Q, in the block's shape."""
        aux = self.fishleg_aux
        return self.maths.diag(aux, self.maths.refresh(aux, None, {}), *self._matrix_shape()).reshape(self.shape)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Q as a matrix (m·n, m·n) over row-major vec(u). For tests and small blocks: quadratic in the block's size."""
        size = torch.Size(self.shape).numel()
        like = next(iter(self.fishleg_aux.values()))
        basis = torch.eye(size, dtype=like.dtype, device=like.device)
        columns = [self.Qv(e.reshape(self.shape)).reshape(-1) for e in basis]
        return torch.stack(columns, dim=1) if columns else basis

    def _matrix_shape(self) -> tuple[int, int]:
        m, *rest = self.shape or (1,)
        return m, torch.Size(rest).numel()

    def start_sgd(self, scale: float = 1.0) -> None:
        """Q₀ = scale·I. ``scale`` > 0 and finite, ValueError otherwise."""
        if not 0 < scale < math.inf:
            raise ValueError(f"scale should be positive and finite but is: {scale}")
        self._start_sgd(scale)

    def _start_sgd(self, scale: float) -> None:
        """Structures with a start of their own override this and the three below; others keep the λ they were given."""

    def new_moments(self) -> Aux:
        """Zeroed second moments of the gradient, as ``start_kfac`` reads them; empty if it reads none."""
        return {}

    def gradient_moments(self, grads: Sequence[Tensor]) -> Aux:
        """Second moments from gradients on drawn labels, each (m, n) and scaled so that E[vec(g) vec(g)ᵀ] = F."""
        return {}

    def layer_moments(self, a: Tensor, e: Tensor, count: float) -> Aux:
        """Second moments from what a layer showed (see :class:`Shown`)."""
        return {}

    @torch.no_grad()
    def average(self, moments: Aux, new: Shown | Aux, weight: float) -> bool:
        """Average new second moments into ``moments``, in place. False where they are not finite; nothing is written
        then.
        """
        found = self.layer_moments(*new) if isinstance(new, Shown) else new
        if not finite(found):
            return False
        for name, moment in moments.items():
            moment.lerp_(found[name], weight)
        return True

    def start_kfac(self, moments: Aux, damping: float, weight: float = 1.0) -> None:
        """Q₀ = the inverse of the damped Fisher matrix in the structure's own approximation of it.

        ``moments`` are to be divided by ``weight``: that of a moving average.
        """


def _new_factor(side: str, size: int, diagonal: Collection[str], max_factor_size: int | None, options: dict) -> Tensor:
    """A zeroed factor for one side of a block: dense, diagonal, or block-diagonal where it would outgrow the limit."""
    if side in diagonal:
        return torch.zeros(size, **options)
    if max_factor_size is None or size <= max_factor_size:
        return torch.zeros(size, size, **options)
    count = -(-size // max_factor_size)
    width = -(-size // count)
    return torch.zeros(count, width, width, **options)


def _set_identity(factor: Tensor, value: float = 1.0) -> None:
    if factor.ndim == 1:
        factor.fill_(value)
    else:
        factor.zero_().diagonal(dim1=-2, dim2=-1).fill_(value)


class _Kronecker(Structure):
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
            _size("max_factor_size", max_factor_size, least=1)
        self._options: dict[str, Any] = {"dtype": _float_dtype(dtype), "device": device}
        self._layout = (diagonal, max_factor_size, self._options)

    def _factors(self) -> tuple[Tensor, Tensor]:
        m, n = self.shape
        return _new_factor("R", m, *self._layout), _new_factor("L", n, *self._layout)

    def _set_factors(self, R: Tensor, L: Tensor, c: Tensor | float = 1.0) -> None:
        """Make Q = RᵀR ⊗ LLᵀ, by cR and L/c."""
        torch.mul(R, c, out=self.fishleg_aux["R"])
        torch.mul(L, 1 / c, out=self.fishleg_aux["L"])
        for name in ("A", "B"):
            if name in self.fishleg_aux:
                self.fishleg_aux[name].fill_(1)

    @torch.no_grad()
    def _start_sgd(self, scale: float) -> None:
        R, L = self._factors()
        for factor in (R, L):
            _set_identity(factor, scale**0.25)
        self._set_factors(R, L)

    def new_moments(self) -> Aux:
        return dict(zip(self.moments, self._factors(), strict=True))

    @torch.no_grad()
    def gradient_moments(self, grads: Sequence[Tensor]) -> Aux:
        """E[GGᵀ] and E[GᵀG], each over the square root of their common trace, so that rows ⊗ columns has F's trace."""
        moments = self.new_moments()
        for g in grads:
            moments["rows"].add_(cross(g, g, moments["rows"]), alpha=1 / len(grads))
            moments["columns"].add_(cross(g.T, g.T, moments["columns"]), alpha=1 / len(grads))
        root = trace(moments["rows"]).sqrt().clamp_min(torch.finfo(moments["rows"].dtype).tiny)
        return {name: moment / root for name, moment in moments.items()}

    @torch.no_grad()
    def layer_moments(self, a: Tensor, e: Tensor, count: float) -> Aux:
        """rows = count·Σ e eᵀ, columns = mean a aᵀ (Martens & Grosse 2015; for convolutions Grosse & Martens 2016)."""
        R, L = list(self.fishleg_aux.values())[:2]  # their layouts
        e, a = e * count**0.5, a / max(a.shape[0], 1) ** 0.5
        return {"rows": cross(e.T, e.T, R), "columns": cross(a.T, a.T, L)}

    @torch.no_grad()
    def average(self, moments: Aux, new: Shown | Aux, weight: float) -> bool:
        """As above; of dense factors within the product that makes the new ones."""
        rows, columns = moments["rows"], moments["columns"]
        if not isinstance(new, Shown) or rows.ndim != 2 or columns.ndim != 2:
            return super().average(moments, new, weight)
        a, e, count = new
        alphas = weight * count, weight / max(a.shape[0], 1)
        sizes = torch.stack([torch.linalg.vector_norm(x).square() * c for x, c in zip((e, a), alphas, strict=True)])
        if not torch.isfinite(sizes).all():  # the traces of what is added
            return False
        rows.addmm_(e.T, e, beta=1 - weight, alpha=alphas[0])
        columns.addmm_(a.T, a, beta=1 - weight, alpha=alphas[1])
        return True

    @torch.no_grad()
    def start_kfac(self, moments: Aux, damping: float, weight: float = 1.0) -> None:
        """(G + √γ/π I)⁻¹ = RᵀR and (Ā + π√γ I)⁻¹ = LLᵀ, π² = (tr Ā/n)/(tr G/m) (Martens & Grosse 2015, section 6.3).

        ``moments``: "rows" G and "columns" Ā, laid out as R and L; their Kronecker product estimates the Fisher matrix.
        Raises torch.linalg.LinAlgError when they are not finite or not positive semi-definite; λ is then unchanged.
        """
        _refuse_non_finite(moments)
        G, A = moments["rows"], moments["columns"]
        m, n = self.shape
        if m == 0 or n == 0:
            return
        tiny = torch.finfo(G.dtype).tiny
        mean_g, mean_a = (trace(G) / weight / m).clamp_min(tiny), (trace(A) / weight / n).clamp_min(tiny)
        pi = (mean_a / mean_g).sqrt()
        R = inverse_root(G, damping**0.5 / pi, weight)
        L = transpose(inverse_root(A, damping**0.5 * pi, weight))
        # Q is the same for cR and L/c. Adam's steps on λ are absolute, so both get one size: where G vanishes, below a
        # layer that starts at zero, π puts twenty orders of magnitude between them.
        sizes = [torch.linalg.vector_norm(diagonal(F, k).double()) / k**0.5 for F, k in ((R, m), (L, n))]
        c = (sizes[1] / sizes[0]).sqrt().to(R.dtype)
        self._set_factors(R, L, c)


class Kron(_Kronecker):
    """Block Kronecker: Q u = A∘(P (A∘u) S), with P = RᵀR, S = LLᵀ, and A only where ``scale``.

    Args:
        m, n: the block's shape.
        scale: an outer diagonal A (m, n) besides.
        diagonal: the factors to keep diagonal: any of "R" (m,), "L" (n,).
        max_factor_size: a larger factor becomes block-diagonal, with blocks of at most this size.
        dtype: of λ: torch.float32 or torch.float64; the default dtype if None.
        device: of λ.
    """

    maths = MATHS["kron"]

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
            self.maths = MATHS["kron-scaled"]
            self.fishleg_aux["A"] = torch.ones(m, n, **self._options)
        self.start_sgd()


class DiagKron(_Kronecker):
    """Block Kronecker with diagonals: Q u = A∘(Rᵀ (B²∘(R (A∘u) L)) Lᵀ), with A, B (m, n).

    As a matrix over row-major vec(u): A (Rᵀ⊗L) B² (R⊗Lᵀ) A. The talk's A (R⊗L) B² (Rᵀ⊗Lᵀ) A, whose R is our Rᵀ.

    Arguments as for :class:`Kron`.
    """

    maths = MATHS["diagkron"]

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


class SumKron(_Kronecker):
    """Sum of block Kroneckers: Q u = Σₖ Pₖ u Sₖ, k = 1 … ``terms``, with λ named R1, L1, R2, L2, ...

    Both starts are exact: term k takes the share wₖ of each column, Lₖ = L diag(√wₖ) with Σₖ wₖ = 1. The shares differ
    from term to term, since equal terms would have equal gradients and stay equal. Other arguments as for
    :class:`Kron`.
    """

    maths = MATHS["sumkron"]

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
        self.terms = _size("terms", terms, least=1)
        for k in range(1, terms + 1):
            self.fishleg_aux[f"R{k}"], self.fishleg_aux[f"L{k}"] = self._factors()
        self.start_sgd()

    def _set_factors(self, R: Tensor, L: Tensor, c: Tensor | float = 1.0) -> None:
        for k in range(self.terms):
            share = torch.full(L.shape[-1:], 0.5 / self.terms, dtype=L.dtype, device=L.device)
            share[k :: self.terms] += 0.5
            torch.mul(R, c, out=self.fishleg_aux[f"R{k + 1}"])
            torch.mul(L, share.sqrt() / c, out=self.fishleg_aux[f"L{k + 1}"])


class Diagonal(Structure):
    """Q u = d²∘u, for a block of any ``shape``; λ is d, of that shape."""

    maths = MATHS["diagonal"]
    moments = ("diagonal",)

    def __init__(
        self,
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(shape)
        self.fishleg_aux = {"d": torch.ones(self.shape, dtype=_float_dtype(dtype), device=device)}

    @torch.no_grad()
    def _start_sgd(self, scale: float) -> None:
        self.fishleg_aux["d"].fill_(scale**0.5)

    def new_moments(self) -> Aux:
        return {"diagonal": torch.zeros_like(self.fishleg_aux["d"])}

    @torch.no_grad()
    def gradient_moments(self, grads: Sequence[Tensor]) -> Aux:
        """E[g²]."""
        moments = self.new_moments()
        for g in grads:
            moments["diagonal"].addcmul_(g, g, value=1 / len(grads))
        return moments

    @torch.no_grad()
    def layer_moments(self, a: Tensor, e: Tensor, count: float) -> Aux:
        """count·Σ (e∘e)(a∘a)ᵀ: exact where every sample has one position; positions count as uncorrelated elsewhere."""
        return {"diagonal": (e * e).T @ (a * a) * count}

    @torch.no_grad()
    def start_kfac(self, moments: Aux, damping: float, weight: float = 1.0) -> None:
        """d² = 1/(diag F + γ); ``moments``: "diagonal", of the block's shape.

        Raises torch.linalg.LinAlgError when they are not finite; λ is then unchanged.
        """
        _refuse_non_finite(moments)
        self.fishleg_aux["d"].copy_((moments["diagonal"] / weight + damping).rsqrt())
