"""The θ step by the CUDA kernels, one call, with what the reference's functions add for blocks they do not cover."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...algebra.low_rank import LowRank
from ...algebra.matrix import Matrix, dense, is_zero
from ...algebra.polar import COEFFICIENTS, polar_factors
from ...model.block import Block
from ..protocol import ThetaOptions
from ..reference import theta_update as reference
from .plans import Op, Plan
from .prepare import Prepared, launched
from .runtime import runtime

NORMALIZE = {None: 0, "rms": 1, "trust": 2, "spectral": 3}
_COEFFICIENTS = tuple(x for step in COEFFICIENTS for x in step)

Uncovered = tuple[int, Block, Matrix, Tensor]  # number, block, what m averages, nat


def theta_step(blocks: Sequence[Block], gs: Sequence[Matrix], options: ThetaOptions) -> tuple[Tensor, Tensor]:
    """As the reference's."""
    spectral = options.normalize == "spectral"
    uncovered: list[Uncovered] = []
    results: list[Tensor] = []
    parameters: list[Tensor] = []

    def launch(p: Prepared) -> bool:
        plan, ours = p.plan, p.ours
        norms = torch.empty(len(blocks), dtype=torch.float32, device=plan.device)
        wide = norms.double() if len(ours) < len(blocks) and any(b.dtype == torch.float64 for b in blocks) else None
        ok = torch.empty((), dtype=torch.bool, device=plan.device)
        results[:] = norms if wide is None else wide, ok
        uncovered[:] = _uncovered(plan, blocks, gs, options)
        parameters[:] = runtime().extension.flattened(list(ours), "params")
        numbers, rates = plan.rates.numbers(blocks, plan.covered, plan.device)
        return plan.native.theta_step(
            plan.stream, plan.workspace.data_ptr(), parameters, p.gradients, p.factors, p.operators,
            [b.momentum for b in ours], [b.step for b in blocks], plan.rates.of_block, plan.rates.of_part, numbers,
            rates, _COEFFICIENTS if spectral else (), options.capturable, not options.before, options.averages,
            NORMALIZE[options.normalize], options.kappa, norms.data_ptr(), 0 if wide is None else wide.data_ptr(),
            ok.data_ptr(),
        )  # fmt: skip

    prepared = launched(Op.THETA, blocks, gs, launch, spectral=spectral)
    if prepared is None:
        return reference.theta_step(blocks, gs, options)
    plan, ours = prepared.plan, prepared.ours
    norms, ok = results
    for k, block, x, nat in uncovered:
        nat, scale = _scaled(plan, k, block, nat, spectral)
        reference.move(block, x, nat, scale, ok, True)
    for block in ours:
        block.product_version = None
    written = [p for p, g in zip(parameters, prepared.gradients, strict=True) if g is not None]
    torch.autograd.graph.increment_version([*written, *[b.momentum for b in ours]])
    if not plan.count([b.step for b in blocks], plan.covered, ok, options.capturable):
        for block in blocks:
            block.product_version = None  # it is ahead of m
    return norms, ok


def _scaled(plan: Plan, k: int, block: Block, nat: Tensor, spectral: bool) -> tuple[Tensor, Tensor]:
    """What an uncovered block moves along after the kernels' decision, and times what: nat or its polar factor."""
    scale = plan.scales[k]
    if not (spectral and block.flattened):
        return nat, scale
    if block.dtype == torch.float32:
        return plan.polar(k, block.shape).to(block.momentum.device), scale
    return polar_factors([nat])[0], torch.where(scale > 0, reference.RMS * max(block.shape) ** 0.5, 0)


def _uncovered(plan: Plan, blocks: Sequence[Block], gs: Sequence[Matrix], options: ThetaOptions) -> list[Uncovered]:
    """Blocks that the kernels do not cover, whose sums, and nat/‖nat‖ where it is for a polar factor, the plan gets."""
    found: list[Uncovered] = []
    if all(plan.covered):
        return found
    for k, (block, g, covered) in enumerate(zip(blocks, gs, plan.covered, strict=True)):
        if covered:
            continue
        x, nat, sums = _summed(block, g, options)
        plan.external[len(found)] = sums.to(plan.device)
        if options.normalize == "spectral" and block.flattened and block.dtype == torch.float32:
            norm = torch.linalg.vector_norm(nat)
            plan.polar(k, block.shape).copy_(nat / torch.where(norm > 0, norm, 1))
        found.append((k, block, x, nat))
    return found


def _summed(block: Block, g: Matrix, options: ThetaOptions) -> tuple[Matrix, Tensor, Tensor]:
    """What m averages, nat, and (‖nat‖², lr₀²⟨m̂ or g, nat⟩, whether g is not zero), by the reference's functions."""
    x, nat = reference.direction(block, g, options)
    device, trust = nat.device, options.normalize == "trust"
    power = reference.trust_length(block, g, nat, options) if trust else torch.zeros((), device=device)
    moving = torch.ones((), device=device) if isinstance(g, LowRank) else ~is_zero(dense(g))
    norm = torch.linalg.vector_norm(nat).double()
    return x, nat, torch.stack([norm.square(), power.double(), moving.double()])
