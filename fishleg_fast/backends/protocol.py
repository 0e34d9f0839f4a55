"""What a backend is: eight ops over lists of blocks, each with one signature, and whether they can run here.

A ``Matrix`` is a tensor (m, n) in λ's dtype, the same as a product of low rank (``algebra.low_rank.LowRank``), or the
gradient in ``block.grads`` (``model.gradients.GradientInPlace``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..algebra.maths import Applications, Aux
from ..algebra.matrix import Matrix
from ..algebra.structures.base import LayerStatistics
from ..availability import Availability as Availability
from ..model.block import Block


class AvailabilityCheck(Protocol):
    """How a backend says whether it can run."""

    def __call__(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Availability:
        """With parameters of ``dtype`` on ``device``; None: at all."""


@dataclass(frozen=True)
class ThetaOptions:
    """How ``theta_step`` steps.

    nesterov: one more average with g: m̂ = (βm + (1−β)g)/(1−βᵗ⁺¹).
    momentum: "before" Q; "after" averages Q g instead, m ← βm + (1−β)Q g and nat = m̂.
    normalize: "rms", c makes each block's root-mean-square 0.2, or is 0 where g is all zero; "trust",
        c = min(1, √(κ/Σ lr₀² m̂ᵀnat)), one for all blocks (gᵀnat for m̂ᵀnat with momentum "after"); None, c = 1;
        "spectral", nat gives way to its polar factor (``algebra.polar``) times 0.2·√max(m, n), which has the
        root-mean-square of "rms" where it is of full rank; a vector's is "rms", and c is 0 as there.
    kappa: κ of "trust".
    capturable: everything is decided on the device, without a synchronisation.
    """

    momentum: str = "before"
    nesterov: bool = False
    normalize: str | None = "rms"
    kappa: float = 1e-3
    capturable: bool = False

    @property
    def averages(self) -> int:
        """How often g is averaged into m̂."""
        return 2 if self.nesterov else 1

    @property
    def before(self) -> bool:
        """Whether momentum comes before Q."""
        return self.momentum == "before"


@dataclass(frozen=True)
class LambdaOptions:
    """How ``lambda_step`` steps.

    damping: γ.
    lr, betas, eps: Adam's.
    precondition: Q w in the place of w.
    learn_scale: False: the gradient is that at Q's best multiple, w = α(F+γI)v − u with α = uᵀv/vᵀ(F+γI)v, orthogonal
        to v, so that only Q's shape is learned.
    capturable: everything is decided on the device, without a synchronisation.
    """

    damping: float
    lr: float | Tensor
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    precondition: bool = False
    learn_scale: bool = True
    capturable: bool = False


class Ops(Protocol):
    """The ops. A module with functions of these signatures is one; ``backends.reference`` says what they compute."""

    def refresh(self, blocks: Sequence[Block], applications: Sequence[Applications] | None = None) -> None:
        """Bring every block's cached products (P and S) up to date with its λ. Reading them does so too.

        ``applications``: how many columns P and rows S of each block will be applied to until λ changes; a product that
        would not pay for itself is left out. Without it all are formed.
        """

    def qv(self, blocks: Sequence[Block], us: Sequence[Matrix]) -> list[Matrix]:
        """Q u for each block, of low rank where u is (which ``structure.keeps_low_rank`` has to allow)."""

    def inner(self, xs: Sequence[Matrix], ys: Sequence[Matrix]) -> Tensor:
        """⟨x, y⟩ over all blocks together: a scalar, float64 where any block is."""

    def theta_step(self, blocks: Sequence[Block], gs: Sequence[Matrix], options: ThetaOptions) -> tuple[Tensor, Tensor]:
        """m ← βm + (1−β)g; nat = Q m̂ with m̂ = m/(1−βᵗ); θ ← θ − lr·(c·nat + wd·θ), in place (eq. 15 of the talk).

        ``gs``: (m, n) each: the gradient, negated where the group maximizes. One of low rank should not be zero, and be
        what ``block.grads`` hold too, from which m is averaged; Q m then follows m by products of low rank, as long as
        λ stays what it is, and is ``block.product``. Parts whose gradient is None keep their parameters.
        Where nat is not finite nothing is written.

        Returns (‖nat‖ of each block (len(blocks),), whether the step was taken: a boolean scalar).
        """

    def lambda_step(
        self,
        blocks: Sequence[Block],
        us: Sequence[Matrix],
        vs: Sequence[Matrix],
        fvs: Sequence[Matrix],
        options: LambdaOptions,
    ) -> tuple[Tensor, Tensor]:
        """One Adam step of every block's λ on 𝒜 = ½ vᵀ(F+γI)v − uᵀv, in place (eqs. 13 and 14 of the talk).

        ∇λ𝒜 = ⟨w, ∂λ(Q u)⟩ with w = (F+γI)v − u held constant. ``vs``: Q u. ``fvs``: F v, of low rank only where v is.
        Where a gradient is not finite, or u is zero, nothing is written.

        Returns (𝒜 of Q as it is, whether the step was taken), scalars.
        """

    def average_moments(
        self, blocks: Sequence[Block], statistics: Sequence[LayerStatistics | Aux], decay: float, more: bool = False
    ) -> list[Block]:
        """Add ``statistics`` to the moving averages of the Fisher's Kronecker factors, with weight 1−decay.

        ``more``: they are another part of the batch whose first part was added before.
        Returns the blocks whose average moved: not those whose statistics are empty or not finite.
        """

    def natural_step(self, blocks: Sequence[Block], damping: float, rate: float) -> None:
        """A natural-gradient step of every block's λ on 𝒜 averaged over u ~ N(0, Q⁻¹), where ``moments`` over their
        weight are those of one batch: of rate ``rate`` over that weight, which is 1 in the end (``algebra.natural``).

        Raises torch.linalg.LinAlgError as ``start_kfac``; NotImplementedError for a structure without such a step.
        """

    def start_kfac(self, blocks: Sequence[Block], damping: float) -> None:
        """Q = (F/unit + damping·I)⁻¹ of each block, F by its moving average.

        Raises torch.linalg.LinAlgError where an average is not positive semi-definite; that block's λ is then
        unchanged.
        """
