"""The λ step over all blocks; its launches are in ``device/lambda_step.py``'s docstring."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....algebra.matrix import Matrix
from ....backends import reference
from ....backends.protocol import LambdaOptions
from ....backends.reference import lambda_update
from ....model.block import Block, advance
from ..plans import plan_of
from ..refresh import refresh_stale, share_products
from .launches import LambdaLaunches
from .plan import LambdaPlan
from .vectors import Vectors


class PreparedStep(LambdaPlan):
    """A plan with its launches, of the options that it was last run with."""

    launches: LambdaLaunches | None = None

    def prepare(self, options: LambdaOptions) -> LambdaLaunches:
        """Its launches."""
        if self.launches is None or not self.launches.are_of(options):
            self.launches = LambdaLaunches(self, options)
        return self.launches


def lambda_step(
    blocks: Sequence[Block],
    us: Sequence[Matrix],
    vs: Sequence[Matrix],
    fvs: Sequence[Matrix],
    options: LambdaOptions,
) -> tuple[Tensor, Tensor]:
    """As the reference's; nothing is decided on the host, which only waits where it counts the steps.

    Blocks that the kernels do not cover take their steps by the reference's functions, with the same 𝒜, α and decision.
    """
    if not blocks:
        return reference.lambda_step(blocks, us, vs, fvs, options)
    vectors = Vectors(blocks, us, vs, fvs)
    key = ("λ", options.precondition, options.learn_scale, options.capturable)
    plan = plan_of(blocks, key, vectors.facts(), lambda: PreparedStep(blocks, vectors, options))
    if not any(plan.kinds):
        return reference.lambda_step(blocks, us, vs, fvs, options)
    if plan.needs_refresh():
        refresh_stale([blocks[i] for i in plan.factored])
    launches = plan.prepare(options)
    read = plan.tell(blocks, vectors, options)
    loss = torch.empty((), dtype=torch.float32, device=plan.device)
    ok = torch.empty((), dtype=torch.bool, device=plan.device)
    for launch in launches.sums:
        launch()
    _add_up_uncovered(plan, us, vs, vectors, options)
    for launch in launches.products:
        launch()
    others = _uncovered_gradients(plan, blocks, us, vs, vectors, options)
    for launch in launches.factors:
        launch()
    for launch in launches.commits:
        launch(loss, ok)
    del read
    for index, grads in others.items():
        lambda_update.adam_step(blocks[index], grads, options, ok)
    _count(plan, blocks, ok)
    return loss, ok


def _add_up_uncovered(
    plan: LambdaPlan, us: Sequence[Matrix], vs: Sequence[Matrix], vectors: Vectors, options: LambdaOptions
) -> None:
    """What blocks that the kernels do not cover contribute to uᵀv and vᵀ(F+γI)v."""
    for index in plan.uncovered:
        u, v, fv = [us[index]], [vs[index]], [vectors.fv[index]]
        plan.dot_sums[0, index] = reference.inner(u, v)
        plan.dot_sums[1, index] = reference.inner(v, fv) + options.damping * reference.inner(v, v)


def _uncovered_gradients(
    plan: LambdaPlan,
    blocks: Sequence[Block],
    us: Sequence[Matrix],
    vs: Sequence[Matrix],
    vectors: Vectors,
    options: LambdaOptions,
) -> dict[int, dict[str, Tensor]]:
    """∂λ of those blocks; their squares are written."""
    if not plan.uncovered:
        return {}
    uQu, vFv = plan.dot_sums[0].sum(), plan.dot_sums[1].sum()
    alpha = torch.where(vFv > 0, uQu / vFv, 1) if not options.learn_scale else None
    found = {}
    for index in plan.uncovered:
        grads = lambda_update.aux_gradients(blocks[index], us[index], vs[index], vectors.fv[index], alpha, options)
        found[index] = grads
        norms = [torch.linalg.vector_norm(g).to(plan.device, torch.float32) for g in grads.values()]
        plan.square_sums[index] = torch.stack(norms).sum() if norms else 0.0
    return found


def _count(plan: LambdaPlan, blocks: Sequence[Block], ok: Tensor) -> None:
    """Count the step, and tell structures and autograd what was written to."""
    advance([block.aux_step for index, block in enumerate(blocks) if index not in plan.counted], ok)
    raised: list[Tensor] = []
    for block, kind in zip(blocks, plan.kinds, strict=True):
        if kind is not None:
            raised += block.structure.fishleg_aux.values()
            raised += block.exp_avg.values()
            raised += block.exp_avg_sq.values()
    torch.autograd.graph.increment_version(raised)
    for index in plan.factored:
        share_products(blocks[index])
    plan.refreshed()
