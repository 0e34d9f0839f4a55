"""The λ step, in plain torch, and its parts, of which other backends take what they have no kernels for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam

from ...algebra.low_rank import DenseAndLowRank, LowRank, LowRankProduct
from ...algebra.maths import Aux
from ...algebra.matrix import Matrix, dense
from ...algebra.stacks import scalars, together
from ...algebra.structures import stacked
from ...model.block import Block, advance
from ...model.stack import Stack, stacks_of
from ..protocol import LambdaOptions
from .products import inner


def lambda_step(
    blocks: Sequence[Block],
    us: Sequence[Matrix],
    vs: Sequence[Matrix],
    fvs: Sequence[Matrix],
    options: LambdaOptions,
) -> tuple[Tensor, Tensor]:
    """One Adam step of every block's λ on 𝒜 = ½ vᵀ(F+γI)v − uᵀv, in place: see ``protocol.Ops``."""
    loss, power, scale = aux_loss(dots(us, vs, fvs), options)
    stacks = stacks_of(blocks, us, vs, fvs)
    found = [_gradients(stack, us, vs, fvs, scale, options) for stack in stacks]
    sums = [torch.linalg.vector_norm(g) for grads in found for g in grads.values()]
    ok = torch.isfinite(scalars([*sums, loss])).all() & (power != 0)
    if not options.capturable and not ok:
        return loss, ok
    _adam(list(zip(stacks, found, strict=True)), options, ok)
    advance([block.aux_step for block in blocks], ok if options.capturable else None)
    return loss, ok


def _gradients(
    stack: Stack,
    us: Sequence[Matrix],
    vs: Sequence[Matrix],
    fvs: Sequence[Matrix],
    scale: Tensor | None,
    options: LambdaOptions,
) -> Aux:
    """∂⟨w, Q u⟩/∂λ of equal blocks, with a dimension in front, from what the lists that they are of have for them."""
    u, v, fv = (xs[stack.numbers[0]] for xs in (us, vs, fvs))
    if any(isinstance(x, LowRank) for x in (u, v, fv)):
        grads = aux_gradients(stack.blocks[0], u, v, fv, scale, options)
        return {name: grad[None] for name, grad in grads.items()}
    whole = stack.matrices(us)
    w = _dense_residual(whole, stack.matrices(vs), stack.matrices(fvs), options.damping, scale)
    if options.precondition:
        w = stacked.product(stack.structures, w)
    return stacked.gradients(stack.structures, whole, w)


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
    return _dense_residual(dense(u), dense(v), dense(fv), damping, scale)


def _dense_residual(u: Tensor, v: Tensor, fv: Tensor, damping: float, scale: Tensor | None) -> Tensor:
    curved = torch.add(fv, v, alpha=damping)
    return (curved if scale is None else curved.mul_(scale.to(curved))).sub_(u)


def adam_step(block: Block, grads: Aux, options: LambdaOptions, ok: Tensor) -> None:
    """Adam on the block's λ where ``ok``, by torch's fused kernel, one pass over memory; the step is not counted."""
    _adam([(Stack([block], [0]), {name: grad[None] for name, grad in grads.items()})], options, ok)


def _adam(chosen: Sequence[tuple[Stack, Aux]], options: LambdaOptions, ok: Tensor) -> None:
    """The same of stacks, with gradients that have a dimension in front."""
    targets, given, averages, squares, steps = (list[Tensor]() for _ in range(5))
    for stack, grads in chosen:
        blocks = stack.blocks
        for name, grad in grads.items():
            mine = [b.structure.fishleg_aux[name] for b in blocks]
            if not mine[0].numel():
                continue
            targets += mine
            given += grad.to(mine[0].dtype).contiguous().unbind()
            averages += [b.exp_avg[name] for b in blocks]
            squares += [b.exp_avg_sq[name] for b in blocks]
            steps += together([b.aux_step for b in blocks]).to(mine[0].device, copy=True).unbind()
    by_device: dict[torch.device, list[int]] = {}
    for k, target in enumerate(targets):
        by_device.setdefault(target.device, []).append(k)
    for device, members in by_device.items():
        adam(
            [targets[k] for k in members],
            [given[k] for k in members],
            [averages[k] for k in members],
            [squares[k] for k in members],
            [],
            [steps[k] for k in members],
            fused=True,
            found_inf=1 - ok.to(device, torch.float32),
            amsgrad=False,
            beta1=options.betas[0],
            beta2=options.betas[1],
            lr=options.lr,
            weight_decay=0.0,
            eps=options.eps,
            maximize=False,
        )
    torch.autograd.graph.increment_version(targets)
