"""What every structure is: a Q(λ) of one block with its cached products and its starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..factors import trace
from ..low_rank import DenseAndLowRank, LowRank, LowRankProduct
from ..maths import Applications, Aux, Maths, no_cache
from ..matrix import Matrix, widest

LambdaVersion = tuple[tuple[int, int], ...]


def size(name: str, value: int, least: int = 0) -> int:
    """``value`` itself; ValueError unless it is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} should be an integer of at least {least} but is: {value!r}")
    return value


def float_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """λ's dtype, the default one for None; ValueError unless λ can have it."""
    dtype = dtype or torch.get_default_dtype()
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype should be torch.float32 or torch.float64 (λ needs the precision) but is: {dtype}")
    return dtype


def finite(moments: Aux, batch: int = 0) -> Tensor:
    """Whether second moments are finite, a boolean tensor: factors ("rows", "columns") are where their traces are.

    ``batch``: so many dimensions in front of each, which the result has too.
    """
    sums = [trace(t, batch) if name in ("rows", "columns") else t.flatten(batch).sum(-1) for name, t in moments.items()]
    return torch.isfinite(torch.stack(sums)).all(0)


def _doubled(x: Tensor) -> Tensor:
    """In float64, on the CPU where its device has none."""
    return x.double() if widest(x.device) == torch.float64 else x.cpu().double()


class LayerStatistics(NamedTuple):
    """What a layer showed in a pass with drawn labels, the loss being a mean over ``terms`` independent ones."""

    a: Tensor  # (positions, n): inputs
    e: Tensor  # (positions, m): output gradients
    terms: float
    positions: int | None = None  # of the whole batch, where a and e are a part of it; None: a's


class Structure:
    """One block's Q(λ). Subclasses set ``maths`` and fill ``fishleg_aux`` in their constructor.

    One that FishLeg is to make is called as ``(m, n, *, diagonal, max_factor_size, dtype, device)``, and takes those
    that it has no use for.

    Attributes:
        shape: (m, n) of the block.
        fishleg_aux: λ, name -> tensor. May be edited in place; the cached products follow.
    """

    maths: Maths
    moments: tuple[str, ...] = ()  # the second moments that ``start_kfac`` reads: the keys of ``new_moments()``

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(size("each size of shape", k) for k in shape)
        self.fishleg_aux: Aux = {}
        self.operand_dtype: torch.dtype | None = None  # what products round their operands to; None: λ's dtype
        self.precision = "ieee"  # what GPU kernels multiply in: see ``precision.kernel_precision``
        self._cache: Aux = {}
        self._memory: Aux = {}  # that of earlier caches, for the next one
        self._cache_key: tuple[LambdaVersion, torch.dtype | None, Applications] | None = None
        self._rounded: Aux = {}

    @property
    def version(self) -> LambdaVersion:
        """Changes whenever λ is written to."""
        return tuple((id(t), t._version) for t in self.fishleg_aux.values())

    def layout(self) -> dict[str, str]:
        """How the Kronecker factors are laid out, in words, by name; empty where there are none."""
        return {}

    @property
    def keeps_low_rank(self) -> bool:
        """Whether Q u is a low-rank matrix where u is one (see ``algebra.low_rank``)."""
        return self.maths.low_rank_qv is not None

    def low_rank_pays(self, rank: int) -> bool:
        """Whether Q u for a u of so low a rank costs less as a matrix of low rank; asked where ``keeps_low_rank``."""
        return rank < min(self.shape)

    @property
    def cache(self) -> Aux:
        """What depends on λ alone (P and S of a Kron), recomputed only when λ was written to."""
        if self.stale:
            self.refresh()
        return self._cache

    @property
    def stale(self) -> bool:
        """Whether λ was written to since the cache was made, or its products are to be of another dtype."""
        return self._cache_key is None or self._cache_key[:2] != (self.version, self.operand_dtype)

    def refresh(self, applications: Applications = None) -> None:
        """Bring the cache up to date with λ, for as much use as ``applications`` says: products that would not pay for
        themselves are left out, and Q u then takes the factors.
        """
        if self.maths.refresh is no_cache:
            return
        if self._cache_key != (self.version, self.operand_dtype, applications):
            self._refresh(applications)

    @torch.inference_mode(False)  # what is kept is written to later
    @torch.no_grad()
    def _refresh(self, applications: Applications) -> None:
        stale = self.stale
        if self._cache_key is not None and self._cache_key[1] != self.operand_dtype:
            self._memory = {}  # of another dtype
        if stale:
            self.forget_rounded()
        aux = self._operands()
        self.keep(self.maths.refresh(aux, applications, {} if stale else self._cache, self._memory), applications)

    def holds(self, *names: str) -> bool:
        """Whether the cached products of those names are there, and of today's λ."""
        return not self.stale and all(n in self._cache for n in names)

    @torch.inference_mode(False)
    def cache_memory(self, multiple: int = 1, **like: Tensor) -> Aux:
        """Memory for the cached products of those names, to be filled and adopted: as large as the matrices given, with
        rows that start at multiples of so many entries.
        """
        memory = {}
        for name, t in like.items():
            old = self._memory.get(name)
            if old is None or old.dtype != t.dtype or old.stride(0) % multiple:
                old = t.new_empty(t.shape[0], -(-t.shape[1] // multiple) * multiple)[:, : t.shape[1]]
            memory[name] = old
        return memory

    def adopt(self, cache: Aux) -> None:
        """Take over products that a backend made of λ as it is now, in memory that they keep."""
        if self.operand_dtype not in (None, self._dtype):
            return  # of another dtype than the cache would be
        self.keep(cache, None)
        self.forget_rounded()

    def keep(self, cache: Aux, applications: Applications) -> None:
        """Have ``cache`` for the products of λ as it is now, formed for so many applications."""
        self._cache, self._memory = cache, {**self._memory, **cache}
        self._cache_key = self.version, self.operand_dtype, applications

    def forget_rounded(self) -> None:
        """λ is to be rounded anew."""
        self._rounded = {}

    @property
    def _dtype(self) -> torch.dtype:
        return next(iter(self.fishleg_aux.values())).dtype

    def _operands(self) -> Aux:
        """λ, rounded where products are to be; kept until λ changes."""
        if not self.keeps_low_rank or self.operand_dtype is None:  # elementwise products stay at full precision
            return self.fishleg_aux
        if not self._rounded:
            self._rounded = {name: t.to(self.operand_dtype) for name, t in self.fishleg_aux.items()}
        return self._rounded

    def product(self, u: Tensor) -> Tensor:
        """Q u in λ's dtype, at the precision of ``operand_dtype``."""
        cache, aux = self.cache, self._operands()
        narrow = self.operand_dtype if self.keeps_low_rank else None
        return self.maths.qv(aux, cache, u.to(narrow or u.dtype)).to(u.dtype)

    def low_rank_product(self, u: LowRank) -> LowRankProduct:
        """Q u for a low-rank u, in ``operand_dtype``."""
        assert self.maths.low_rank_qv is not None
        cache, aux = self.cache, self._operands()
        return self.maths.low_rank_qv(aux, cache, u.to(self.operand_dtype))

    def gradients(self, u: Tensor, w: Tensor) -> Aux:
        """∂⟨w, Q u⟩/∂λ, in ``operand_dtype``."""
        cache, aux = self.cache, self._operands()
        narrow = self.operand_dtype if self.keeps_low_rank else None
        return self.maths.grads(aux, cache, u.to(narrow or u.dtype), w.to(narrow or w.dtype))

    def low_rank_gradients(self, u: LowRank, v: LowRankProduct, w: DenseAndLowRank) -> Aux:
        """The same for a low-rank u, of which v is ``low_rank_product``."""
        assert self.maths.low_rank_grads is not None
        return self.maths.low_rank_grads(self._operands(), u.to(self.operand_dtype), v, w.to(self.operand_dtype))

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
        return self.maths.diag(aux, self.maths.refresh(aux, None, {}, {}), *self._matrix_shape()).reshape(self.shape)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Q as a matrix (m·n, m·n) over row-major vec(u). For tests and small blocks: quadratic in the block's size."""
        k = torch.Size(self.shape).numel()
        like = next(iter(self.fishleg_aux.values()))
        basis = torch.eye(k, dtype=like.dtype, device=like.device)
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
        """Structures with a start of their own override this and those below; others keep the λ they were given."""

    def new_moments(self) -> Aux:
        """Zeroed second moments of the gradient, as ``start_kfac`` reads them; empty if it reads none."""
        return {}

    def gradient_moments(self, grads: Sequence[Tensor]) -> Aux:
        """Second moments from gradients on drawn labels, each (m, n) and scaled so that E[vec(g) vec(g)ᵀ] = F."""
        return {}

    def layer_moments(self, a: Tensor, e: Tensor, count: float, positions: int | None = None) -> Aux:
        """Second moments from what a layer showed (see :class:`LayerStatistics`)."""
        return {}

    def mean_eigenvalue(self, moments: Aux, weight: float = 1.0) -> Tensor:
        """Of the Fisher matrix that the moments tell, to be divided by ``weight``: a scalar; 1 where they tell none."""
        return torch.ones((), device="cpu")

    def fisher_product(self, moments: Aux, weight: Tensor | float, v: Matrix) -> Matrix:
        """F v of the Fisher matrix that the moments tell, to be divided by ``weight``; those of low rank stay so."""
        raise NotImplementedError(f"{type(self).__name__} has moments but no fisher_product")

    @torch.no_grad()
    def average(self, moments: Aux, new: LayerStatistics | Aux, weight: float, decay: float) -> bool:
        """moments ← decay·moments + weight·new, in place. False where new is not finite; nothing is written then."""
        found = self.layer_moments(*new) if isinstance(new, LayerStatistics) else new
        if not found or not finite(found):
            return False
        for name, moment in moments.items():
            moment.mul_(decay).add_(found[name], alpha=weight)
        return True

    def kfac_start(
        self, moments: Aux, damping: float, weight: Tensor | float = 1.0, floor: float = 0.0
    ) -> tuple[Aux, Tensor] | None:
        """λ of Q₀ = the inverse of the damped Fisher matrix in the structure's own approximation of it, and whether it
        is right, a boolean tensor; None where there is no such start.

        ``moments`` are to be divided by ``weight``: that of a moving average. All may have a dimension in front: those
        of equal structures. ``floor``: further damping, relative to the moments' diagonals.
        """
        return None

    def natural_update(
        self, aux: Aux, moments: Aux, damping: float, rate: Tensor, weight: Tensor | float = 1.0
    ) -> tuple[Aux, Tensor]:
        """λ after a natural-gradient step on the auxiliary loss of a batch's ``moments``, averaged over u, and whether
        it is right, a boolean tensor. ``aux``: λ before it. ``rate``: η in (0, 1], a scalar tensor; 1 forgets it.

        All may have a dimension in front, as those of ``kfac_start``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no natural_update")

    @torch.no_grad()
    def step_naturally(self, moments: Aux, damping: float, rate: Tensor, weight: Tensor | float = 1.0) -> None:
        """λ by ``natural_update``; of float64 where rounding spoils a Cholesky factorisation.

        Raises torch.linalg.LinAlgError as ``start_kfac`` does; λ is then unchanged, as it is where it is not finite.
        """
        found, right = self.natural_update(self.fishleg_aux, moments, damping, rate, weight)
        if not right and finite(moments):
            aux, doubled = ({name: _doubled(t) for name, t in given.items()} for given in (self.fishleg_aux, moments))
            wide = _doubled(weight) if isinstance(weight, Tensor) else weight
            found, right = self.natural_update(aux, doubled, damping, _doubled(rate), wide)
        if not right and not all(bool(torch.isfinite(t).all()) for t in self.fishleg_aux.values()):
            return  # λ was spoilt before, which the step that uses it tells
        if not right:
            raise torch.linalg.LinAlgError(
                f"moments should be finite and positive semi-definite but are not: {sorted(moments)}"
            )
        for name, value in found.items():
            self.fishleg_aux[name].copy_(value)

    @torch.no_grad()
    def start_kfac(self, moments: Aux, damping: float, weight: Tensor | float = 1.0) -> None:
        """Q₀ by ``kfac_start``; of float64 where rounding spoils a Cholesky factorisation.

        Raises torch.linalg.LinAlgError where the moments are not finite or not positive semi-definite; λ is then
        unchanged.
        """
        start = self.kfac_start(moments, damping, weight)
        if start is not None and not start[1] and finite(moments):
            doubled = {name: _doubled(t) for name, t in moments.items()}
            wide = _doubled(weight) if isinstance(weight, Tensor) else weight
            start = self.kfac_start(doubled, damping, wide, floor=1e-12)
        if start is None:
            return
        if not start[1]:
            raise torch.linalg.LinAlgError(
                f"moments should be finite and positive semi-definite but are not: {sorted(moments)}"
            )
        for name, value in start[0].items():
            self.fishleg_aux[name].copy_(value)
