"""The λ step, in plain torch, and its parts, of which other backends take what they have no kernels for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam

from ...algebra.low_rank import DenseAndLowRank, LowRank, LowRankProduct
from ...algebra.maths import Aux
from ...algebra.matrix import Matrix, dense
from ...model.block import Block, advance
from ..protocol import LambdaOptions
from .products import inner, stacked


def lambda_step(
    blocks: Sequence[Block],
    us: Sequence[Matrix],
    vs: Sequence[Matrix],
    fvs: Sequence[Matrix],
    options: LambdaOptions,
) -> tuple[Tensor, Tensor]:
    """One Adam step of every block's λ on 𝒜 = ½ vᵀ(F+γI)v − uᵀv, in place: see ``protocol.Ops``."""
    loss, power, scale = aux_loss(dots(us, vs, fvs), options)
    all_grads = [aux_gradients(b, u, v, fv, scale, options) for b, u, v, fv in zip(blocks, us, vs, fvs, strict=True)]
    sums = [torch.linalg.vector_norm(g) for grads in all_grads for g in grads.values()]
    ok = torch.isfinite(stacked([*sums, loss])).all() & (power != 0)
    if not options.capturable and not ok:
        return loss, ok
    for block, grads in zip(blocks, all_grads, strict=True):
        adam_step(block, grads, options, ok)
    advance([block.aux_step for block in blocks], ok if options.capturable else None)
    return loss, ok


def dots(us: Sequence[Matrix], vs: Sequence[Matrix], fvs: Sequence[Matrix]) -> Tensor:
    """⟨v, F v⟩, ⟨v, v⟩ and ⟨u, v⟩ over all blocks together: (3,), of no blocks zeros."""
    return torch.stack([inner(vs, fvs), inner(vs, vs), inner(us, vs)]) if us else torch.zeros(3, device="cpu")


def aux_loss(dots: Tensor, options: LambdaOptions) -> tuple[Tensor, Tensor, Tensor | None]:
    """(𝒜, uᵀv, α), as ``LambdaOptions`` have it; α is None for 1."""
    vFv, vv, power = dots
    vFv = vFv + options.damping * vv  # with γI
    # Sampled Hessians may have negative curvature.
    scale = None if options.learn_scale else torch.where(vFv > 0, power / vFv, 1)
    return 0.5 * vFv - power, power, scale


def aux_gradients(block: Block, u: Matrix, v: Matrix, fv: Matrix, scale: Tensor | None, options: LambdaOptions) -> Aux:
    """∂⟨w, Q u⟩/∂λ of one block, with w as ``LambdaOptions`` say and ``scale`` its α."""
    w = residual(u, v, fv, options.damping, scale)
    if options.precondition:
        w = block.structure.product(dense(w))
    if isinstance(u, LowRank) and isinstance(v, LowRankProduct) and isinstance(w, DenseAndLowRank):
        return block.structure.low_rank_gradients(u, v, w)
    return block.structure.gradients(dense(u), dense(w))


def residual(u: Matrix, v: Matrix, fv: Matrix, damping: float, scale: Tensor | None) -> Tensor | DenseAndLowRank:
    """α(F+γI)v − u; of low-rank u and v without a dense matrix, but that of F v where it is one."""
    if isinstance(u, LowRank) and isinstance(v, LowRankProduct):
        term = LowRank(v.E.to(u.E.dtype) * damping, v.H.to(u.H.dtype))
        if scale is not None:
            c = scale.to(u.E)
            fv, term = fv.scaled(c) if isinstance(fv, LowRank) else dense(fv) * c, term.scaled(c)
        return DenseAndLowRank.of(fv if isinstance(fv, LowRank) else dense(fv), term, u.scaled(-1))
    curved = torch.add(dense(fv), dense(v), alpha=damping)
    return (curved if scale is None else curved.mul_(scale.to(curved))).sub_(dense(u))


def adam_step(block: Block, grads: Aux, options: LambdaOptions, ok: Tensor) -> None:
    """Adam on the block's λ where ``ok``, by torch's fused kernel, one pass over memory; the step is not counted."""
    device = block.momentum.device
    skip = 1 - ok.to(device, torch.float32)
    for name, grad in grads.items():
        target = block.structure.fishleg_aux[name]
        if not target.numel():
            continue
        adam(
            [target],
            [grad.to(target.dtype).contiguous()],
            [block.exp_avg[name]],
            [block.exp_avg_sq[name]],
            [],
            [block.aux_step.to(device, copy=True)],
            fused=True,
            found_inf=skip,
            amsgrad=False,
            beta1=options.betas[0],
            beta2=options.betas[1],
            lr=options.lr,
            weight_decay=0.0,
            eps=options.eps,
            maximize=False,
        )
        torch.autograd.graph.increment_version(target)
