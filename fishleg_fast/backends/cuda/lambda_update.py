"""The λ step by the CUDA kernels, two calls, with what the reference's functions add for blocks they do not cover."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...algebra.maths import Aux
from ...algebra.matrix import Matrix, dense, dot
from ...model.block import Block
from ..protocol import LambdaOptions
from ..reference import lambda_update as reference
from .coverage import BlockFacts
from .plans import GradientViews, Op, Plan
from .products import prepare

Uncovered = tuple[Block, Matrix, Matrix, Matrix]  # block, u, v, F v


def lambda_step(
    blocks: Sequence[Block],
    us: Sequence[Matrix],
    vs: Sequence[Matrix],
    fvs: Sequence[Matrix],
    options: LambdaOptions,
) -> tuple[Tensor, Tensor]:
    """As the reference's."""
    plan, facts, views = prepare(Op.LAMBDA, blocks, us, vs)
    if plan is None:
        return reference.lambda_step(blocks, us, vs, fvs, options)
    ours = [b for b, view in zip(blocks, views, strict=True) if view is not None]
    uncovered: list[Uncovered] = []
    for block, found, u, v, fv, view in zip(blocks, facts, us, vs, fvs, views, strict=True):
        if view is None:
            dots = [dot(u, v), dot(v, fv), dot(v, v)]
            plan.external[len(uncovered)] = torch.stack([d.to(plan.device, torch.float64) for d in dots])
            uncovered.append((block, u, v, fv))
        else:
            _point_to_block(plan, block, found, v, fv, view, options)
    loss, alpha = (torch.empty((), dtype=torch.float32, device=plan.device) for _ in range(2))
    ok = torch.empty((), dtype=torch.bool, device=plan.device)
    workspace = plan.workspace.data_ptr()
    plan.native.aux_loss(
        plan.stream, workspace, plan.lists[0], options.damping, options.learn_scale, loss.data_ptr(), alpha.data_ptr()
    )
    gradients = _uncovered_gradients(plan, uncovered, alpha, options)
    lr = options.lr
    on_device = isinstance(lr, Tensor) and lr.device == plan.device
    pointer = plan.hold(lr.float()).data_ptr() if isinstance(lr, Tensor) and on_device else 0
    plan.native.aux_update(
        plan.stream, workspace, plan.lists[1], options.damping, options.precondition, 0.0 if on_device else float(lr),
        pointer, *options.betas, options.eps, ok.data_ptr(),
    )  # fmt: skip
    plan.begin()
    for block, grads in gradients:
        reference.adam_step(block, grads, options, ok)
    torch.autograd.graph.increment_version([t for b in ours for t in b.structure.fishleg_aux.values()])
    plan.count([b.aux_step for b in ours], [b.aux_step for b, *_ in uncovered], ok, options.capturable)
    return loss, ok


def _point_to_block(
    plan: Plan, block: Block, facts: BlockFacts, v: Matrix, fv: Matrix, view: GradientViews, options: LambdaOptions
) -> None:
    """Where λ, its moments, u, v and F v of a block are, and its counter."""
    plan.pointers += facts.operator(block)
    for name in facts.lambdas:
        plan.point(block.structure.fishleg_aux[name], block.exp_avg[name], block.exp_avg_sq[name])
    if not facts.kronecker:
        plan.point(None, None, None)
    step = block.aux_step if options.capturable and block.aux_step.device == plan.device else None
    plan.point(plan.hold(dense(v).float().contiguous()), plan.hold(dense(fv).float().contiguous()), step)
    plan.numbers.append(0.0 if step is not None else block.aux_step.item())
    plan.take(view)


def _uncovered_gradients(
    plan: Plan, uncovered: Sequence[Uncovered], alpha: Tensor, options: LambdaOptions
) -> list[tuple[Block, Aux]]:
    """λ-gradients by the reference's functions, whose squared norms go into the kernels' decision."""
    gradients = []
    for i, (block, u, v, fv) in enumerate(uncovered):
        grads = reference.aux_gradients(block, u, v, fv, None if options.learn_scale else alpha, options)
        size = sum(torch.linalg.vector_norm(g).to(plan.device, torch.float64).square() for g in grads.values())
        plan.external_2[i, 0] = size
        gradients.append((block, grads))
    return gradients
