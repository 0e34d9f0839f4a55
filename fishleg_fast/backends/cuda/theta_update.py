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
from .products import prepare

NORMALIZE = {None: 0, "rms": 1, "trust": 2, "spectral": 3}
_COEFFICIENTS = tuple(x for step in COEFFICIENTS for x in step)

Uncovered = tuple[int, Block, Matrix, Tensor]  # number, block, what m averages, nat


def theta_step(blocks: Sequence[Block], gs: Sequence[Matrix], options: ThetaOptions) -> tuple[Tensor, Tensor]:
    """As the reference's."""
    spectral = options.normalize == "spectral"
    flat = [spectral and b.flattened and b.dtype == torch.float32 for b in blocks]
    plan, facts, views = prepare(Op.THETA, blocks, gs, flat=flat)
    if plan is None:
        return reference.theta_step(blocks, gs, options)
    ours = [b for b, view in zip(blocks, views, strict=True) if view is not None]
    uncovered: list[Uncovered] = []
    for k, (block, found, g, view) in enumerate(zip(blocks, facts, gs, views, strict=True)):
        step = block.step if options.capturable and block.step.device == plan.device else None
        base_lr = 1.0 if view is None else block.groups[0]["base_lr"]  # which the sums of an uncovered block contain
        plan.numbers += (block.beta, base_lr, 0.0 if step is not None else block.step.item())
        if view is None:
            x, nat, sums = _uncovered(block, g, options)
            plan.external[len(uncovered)] = sums.to(plan.device)
            if flat[k]:
                norm = torch.linalg.vector_norm(nat)
                plan.polar(k, block.shape).copy_(nat / torch.where(norm > 0, norm, 1))
            uncovered.append((k, block, x, nat))
            plan.point(step)
            continue
        plan.point(block.momentum)
        plan.pointers += found.operator(block)
        plan.point(found.outer(block), step)
        plan.take(view)
        _point_to_parameters(plan, block)
    plan.numbers += _COEFFICIENTS if spectral else ()
    norms = torch.empty(len(blocks), dtype=torch.float32, device=plan.device)
    wide = norms.double() if any(b.dtype == torch.float64 for b in blocks) else None
    ok = torch.empty((), dtype=torch.bool, device=plan.device)
    plan.native.theta_step(
        plan.stream, plan.workspace.data_ptr(), *plan.lists, not options.before, options.averages,
        NORMALIZE[options.normalize], options.kappa, norms.data_ptr(), 0 if wide is None else wide.data_ptr(),
        ok.data_ptr(),
    )  # fmt: skip
    plan.begin()
    for k, block, x, nat in uncovered:
        nat, scale = _scaled(plan, k, block, nat, spectral)
        reference.move(block, x, nat, scale, ok, True)
    for block in ours:
        block.product_version = None
    written = [p.param for b in ours for p, g in zip(b.parts, b.grads, strict=True) if g is not None]
    torch.autograd.graph.increment_version([*written, *(b.momentum for b in ours)])
    plan.count([b.step for b in ours], [b.step for _, b, *_ in uncovered], ok, options.capturable)
    if not options.capturable and not ok:
        for block in blocks:
            block.product_version = None  # it is ahead of m
    return norms if wide is None else wide, ok


def _point_to_parameters(plan: Plan, block: Block) -> None:
    """Where parameters and rates on the device are, and the host's rates."""
    for part, grad, group in zip(block.parts, block.grads, block.groups, strict=True):
        lr = group["lr"]
        on_device = isinstance(lr, Tensor) and lr.device == plan.device
        plan.point(None if grad is None else part.of(part.param), plan.hold(lr.float()) if on_device else None)
        plan.numbers += (0.0 if on_device else float(lr), group["weight_decay"])


def _scaled(plan: Plan, k: int, block: Block, nat: Tensor, spectral: bool) -> tuple[Tensor, Tensor]:
    """What an uncovered block moves along after the kernels' decision, and times what: nat or its polar factor."""
    scale = plan.scales[k]
    if not (spectral and block.flattened):
        return nat, scale
    if block.dtype == torch.float32:
        return plan.polar(k, block.shape).to(block.momentum.device), scale
    return polar_factors([nat])[0], torch.where(scale > 0, reference.RMS * max(block.shape) ** 0.5, 0)


def _uncovered(block: Block, g: Matrix, options: ThetaOptions) -> tuple[Matrix, Tensor, Tensor]:
    """What m averages, nat, and (‖nat‖², lr₀²⟨m̂ or g, nat⟩, whether g is not zero), by the reference's functions."""
    x, nat = reference.direction(block, g, options)
    device, trust = nat.device, options.normalize == "trust"
    power = reference.trust_length(block, g, nat, options) if trust else torch.zeros((), device=device)
    moving = torch.ones((), device=device) if isinstance(g, LowRank) else ~is_zero(dense(g))
    norm = torch.linalg.vector_norm(nat).double()
    return x, nat, torch.stack([norm.square(), power.double(), moving.double()])
