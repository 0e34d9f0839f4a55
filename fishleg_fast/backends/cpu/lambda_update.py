"""The λ step on a CPU: λ-gradients of packed blocks as products that Adam multiplies out, and Adam in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import native
from ...algebra.low_rank import LowRank, LowRankProduct
from ...algebra.matrix import Matrix, dense
from ...model.block import Block, advance
from ..protocol import LambdaOptions
from ..reference import lambda_update as reference
from . import packed_products
from .packed_gradients import LowRankTerms, PackedGradient, forget, packed_gradients
from .step_plan import CODES


def lambda_step(
    blocks: Sequence[Block],
    us: Sequence[Matrix],
    vs: Sequence[Matrix],
    fvs: Sequence[Matrix],
    options: LambdaOptions,
) -> tuple[Tensor, Tensor]:
    """As the reference's."""
    plain = [_plain(block) for block in blocks]
    mine = [k for k, block in enumerate(blocks) if plain[k] and packed_products.covers(block)]
    terms: dict[int, LowRankTerms] = {}
    for k in mine:
        u, v = us[k], vs[k]
        if isinstance(u, LowRank) and isinstance(v, LowRankProduct) and not options.precondition:
            terms[k] = LowRankTerms(u, v, fvs[k])
    rest = [k for k in range(len(blocks)) if k not in terms]
    dots = reference.dots([us[k] for k in rest], [vs[k] for k in rest], [fvs[k] for k in rest])
    for found in terms.values():
        dots = dots + found.dots()
    loss, power, scale = reference.aux_loss(dots, options)
    gradients: dict[int, Mapping[str, Any]] = {
        k: reference.aux_gradients(blocks[k], us[k], vs[k], fvs[k], scale, options)
        for k in sorted(set(rest).difference(mine))
    }
    ws: list[Any] = []
    for k in mine:
        if k in terms:
            ws.append(terms[k].residual(options.damping, 1.0 if scale is None else float(scale)))
        else:
            ws.append(dense(reference.residual(us[k], vs[k], fvs[k], options.damping, scale)))
    if options.precondition:
        ws = [*packed_products.qv([blocks[k] for k in mine], ws)]
    packed = packed_gradients([blocks[k] for k in mine], [terms.get(k, us[k]) for k in mine], ws)
    gradients |= zip(mine, packed, strict=True)
    ok = bool(torch.isfinite(loss)) and bool(power != 0) and _adam_step(blocks, gradients, plain, options)
    forget([blocks[k] for k in mine if k not in terms])
    return loss, torch.tensor(ok, device="cpu")


def _plain(block: Block) -> bool:
    """Whether all of λ is as the C++ code takes it, which that of a user's layer need not be."""
    aux = block.structure.fishleg_aux
    tensors = [t for name in aux for t in (aux[name], block.exp_avg[name], block.exp_avg_sq[name])]
    return all(t.dtype == block.dtype and t.is_contiguous() for t in tensors)


def _adam_step(
    blocks: Sequence[Block], gradients: Mapping[int, Mapping[str, Any]], plain: Sequence[bool], options: LambdaOptions
) -> bool:
    """Adam on the λ of all blocks, by torch where it is not plain; whether it was taken."""
    ours = [(b, gradients[k]) for k, b in enumerate(blocks) if plain[k]]
    others = [(b, gradients[k]) for k, b in enumerate(blocks) if not plain[k]]
    ok = all(bool(torch.isfinite(g).all()) for _, grads in others for g in grads.values())
    ok = ok and _adam(ours, options)
    if ok:
        for block, grads in others:
            reference.adam_step(block, dict(grads), options, torch.tensor(True, device="cpu"))
        advance([block.aux_step for block, _ in others])
    return ok


def _adam(chosen: Sequence[tuple[Block, Mapping[str, Tensor | PackedGradient]]], options: LambdaOptions) -> bool:
    """Adam on the λ of blocks; whether it was taken."""
    rows, kept, written, engine = [], [], [], None
    for block, grads in chosen:
        count = float(block.aux_step) + 1
        for name, grad in grads.items():
            value = block.structure.fishleg_aux[name]
            address, code, factors = 0, CODES[block.dtype], None
            if isinstance(grad, Tensor):
                if grad.dtype not in (block.dtype, torch.bfloat16):
                    grad = grad.to(block.dtype)
                grad = grad.contiguous()
                kept.append(grad)
                address, code = grad.data_ptr(), CODES[grad.dtype]
            else:
                left, right = grad
                factors, engine = (left.address, right.address, left.columns, right.columns), left.engine
            written.append(value)
            addresses = (t.data_ptr() for t in (value, block.exp_avg[name], block.exp_avg_sq[name]))
            rows.append(
                (f"{block.name}.{name}", value.numel(), *addresses, address, code, CODES[value.dtype], count, factors)
            )
    if not native.extension().adam_step(
        rows, float(options.lr), *options.betas, options.eps, torch.get_num_threads(), engine
    ):
        return False
    torch.autograd.graph.increment_version(written)
    for block, _ in chosen:
        block.aux_step.add_(1)
    return True
