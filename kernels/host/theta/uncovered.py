"""Blocks that the kernels do not cover, in a θ step of the kernels: the reference's functions step them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....algebra.matrix import Matrix
from ....algebra.polar import polar_factors
from ....backends.reference import theta_update
from ....model.block import Block
from .plan import ThetaPlan


class UncoveredBlocks:
    """Those of one step, with the same norms, trust region and decision as the others."""

    def __init__(self, plan: ThetaPlan, blocks: Sequence[Block], gs: Sequence[Matrix]) -> None:
        self._plan, self._blocks, self._gs = plan, blocks, gs
        self._directions: dict[int, tuple] = {}

    def add_up(self) -> None:
        """What they contribute to the sums."""
        plan, options = self._plan, self._plan.options
        for index in plan.uncovered:
            block, g = self._blocks[index], self._gs[index]
            x, nat = theta_update.direction(block, g, options)
            correction = 1 - block.beta ** (block.step.to(plan.device) + options.averages)
            norm = torch.linalg.vector_norm(nat).to(plan.device, torch.float32)
            self._directions[index] = x, nat, correction, norm / correction
            if index in plan.polar:
                (m, n), unit = block.shape, nat / torch.where(norm > 0, norm, 1)
                plan.polar[index].polar.zero_()[:, :n].copy_(unit)
                plan.polar[index].polar_t.zero_()[:, :m].copy_(unit.T)
            plan.sums[0, index] = norm.square()
            if options.normalize == "trust":
                length = theta_update.trust_length(block, g, nat, options).to(plan.device)
                plan.sums[1, index] = length / (correction if plan.after else correction**2)

    def move(self, norms: Tensor, ok: Tensor) -> None:
        """Move them as the sums of all say. Their ``norms`` are written."""
        plan, rule = self._plan, self._plan.options.normalize
        if not self._directions:
            return
        scale = theta_update.trust_scale(plan.sums[1].sum(), plan.options.kappa) if rule == "trust" else None
        for index, (x, nat, correction, norm) in self._directions.items():
            norms[index] = norm
            block, c = self._blocks[index], scale
            if rule in ("rms", "spectral"):
                flat = plan.flattens(block)
                c = theta_update.spectral_scale(block, self._gs[index], flat, norm, correction)
                if index in plan.polar:
                    nat = plan.polar[index].polar[:, : block.shape[1]]
                elif flat:
                    (nat,) = polar_factors([nat], exact=nat.device.type == "cpu")
            c = 1 / correction if c is None else c / correction
            theta_update.move(block, x, nat, c, ok, True)
