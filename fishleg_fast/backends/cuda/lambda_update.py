"""The λ step by the CUDA kernels, two calls, with what the reference's functions add for blocks they do not cover."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...algebra.maths import Aux
from ...algebra.matrix import Matrix, dense, dot
from ...model.block import Block, advance
from ..protocol import LambdaOptions
from ..reference import lambda_update as reference
from .plans import Op, Plan
from .prepare import Prepared, launched

Uncovered = tuple[Block, Matrix, Matrix, Matrix]  # block, u, v, F v


def lambda_step(
    blocks: Sequence[Block],
    us: Sequence[Matrix],
    vs: Sequence[Matrix],
    fvs: Sequence[Matrix],
    options: LambdaOptions,
) -> tuple[Tensor, Tensor]:
    """As the reference's."""
    uncovered: list[Uncovered] = []
    results: list[Tensor] = []

    def launch(p: Prepared) -> bool:
        plan, inside = p.plan, p.plan.covered
        results[:] = [torch.empty((), dtype=torch.float32, device=plan.device) for _ in range(2)]
        uncovered[:] = _uncovered(plan, blocks, us, vs, fvs)
        mine = [[x for x, covered in zip(xs, inside, strict=True) if covered] for xs in (vs, fvs)]
        before = plan.stream, plan.workspace.data_ptr(), p.gradients, p.factors, p.operators, _adam_tensors(p.ours)
        after = ([b.aux_step for b in p.ours], options.capturable, options.damping, options.learn_scale)
        pointers = [t.data_ptr() for t in results]
        if plan.native.aux_loss(*before, *mine, *after, *pointers):
            return True
        held[:] = [[dense(x).float().contiguous() for x in xs] for xs in mine]
        return plan.native.aux_loss(*before, *held, *after, *pointers)

    held: list[list[Tensor]] = []  # copies of v and F v, until all is launched
    prepared = launched(Op.LAMBDA, blocks, us, launch, vs=vs)
    if prepared is None:
        return reference.lambda_step(blocks, us, vs, fvs, options)
    plan, ours = prepared.plan, prepared.ours
    loss, alpha = results
    ok = torch.empty((), dtype=torch.bool, device=plan.device)
    gradients = _uncovered_gradients(plan, uncovered, alpha, options)
    lr = options.lr
    rate = lr.float() if isinstance(lr, Tensor) and lr.device == plan.device else None
    plan.native.aux_update(
        plan.stream, plan.workspace.data_ptr(), options.precondition, 0.0 if rate is not None else float(lr),
        0 if rate is None else rate.data_ptr(), *options.betas, options.eps, ok.data_ptr(),
    )  # fmt: skip
    for block, grads in gradients:
        reference.adam_step(block, grads, options, ok)
    torch.autograd.graph.increment_version([t for b in ours for t in b.structure.fishleg_aux.values()])
    if uncovered:
        advance([b.aux_step for b, *_ in uncovered], ok)
    plan.count([b.aux_step for b in ours], [True] * len(ours), ok, options.capturable)
    return loss, ok


def _adam_tensors(blocks: Sequence[Block]) -> list[Tensor | None]:
    """Each block's R and L with their moments; or d with its, and three None."""
    tensors: list[Tensor | None] = []
    for block in blocks:
        aux, first, second = block.structure.fishleg_aux, block.exp_avg, block.exp_avg_sq
        if "d" in aux:
            tensors += (aux["d"], first["d"], second["d"], None, None, None)
        else:
            tensors += (aux["R"], first["R"], second["R"], aux["L"], first["L"], second["L"])
    return tensors


def _uncovered(
    plan: Plan, blocks: Sequence[Block], us: Sequence[Matrix], vs: Sequence[Matrix], fvs: Sequence[Matrix]
) -> list[Uncovered]:
    """Blocks that the kernels do not cover, whose sums the plan gets."""
    found: list[Uncovered] = []
    if all(plan.covered):
        return found
    for block, u, v, fv, covered in zip(blocks, us, vs, fvs, plan.covered, strict=True):
        if not covered:
            dots = [dot(u, v), dot(v, fv), dot(v, v)]
            plan.external[len(found)] = torch.stack([d.to(plan.device, torch.float64) for d in dots])
            found.append((block, u, v, fv))
    return found


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
