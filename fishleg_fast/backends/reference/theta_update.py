"""The θ step, in plain torch, and its parts, of which other backends take what they have no kernels for.

Equal blocks are stepped together (``model.stack``): how many operations a step takes does not grow with their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...algebra.low_rank import LowRank
from ...algebra.matrix import Matrix, dense, dot
from ...algebra.polar import polar_factors
from ...algebra.stacks import scalars, together
from ...algebra.structures import stacked
from ...model.block import Block, advance
from ...model.stack import Stack, stacks_of
from ..protocol import ThetaOptions

RMS = 0.2  # of a normalised update: the convention of Muon's users, under which AdamW's lr roughly carries over


@dataclass
class Direction:
    """Where equal blocks go."""

    stack: Stack
    g: Tensor | LowRank  # (count, m, n), or that of the one block
    x: Tensor | LowRank  # what m averages
    nat: Tensor  # (count, m, n), before its bias correction
    correction: Tensor  # (count,), what that divides by
    norms: Tensor  # ‖nat‖ with it, (count,)
    scales: Tensor  # what multiplies nat, (count,)

    @staticmethod
    def of(stack: Stack, gs: Sequence[Matrix], options: ThetaOptions) -> Direction:
        """Not scaled yet."""
        g, x, nat = _x_and_nat(stack, gs, options)
        correction = _correction(stack, options, nat)
        norms = torch.linalg.vector_norm(nat, dim=(1, 2)) / correction
        return Direction(stack, g, x, nat, correction, norms, 1 / correction)


def theta_step(blocks: Sequence[Block], gs: Sequence[Matrix], options: ThetaOptions) -> tuple[Tensor, Tensor]:
    """m ← βm + (1−β)g; nat = Q m̂; θ ← θ − lr·(c·nat + wd·θ): see ``protocol.Ops``."""
    directions = _directions(blocks, gs, options)
    numbers = [k for d in directions for k in d.stack.numbers]
    norms = dict(zip(numbers, [norm for d in directions for norm in d.norms.unbind()], strict=True))
    found = scalars([norms[k] for k in range(len(blocks))])
    ok = torch.isfinite(found).all()
    if not options.capturable and not ok:
        for block in blocks:
            block.product_version = None  # it is ahead of m
        return found, ok
    _scale(directions, options)
    for d in directions:
        move_stack(d.stack, d.x, d.nat, d.scales, ok if options.capturable else None)
    advance([block.step for block in blocks], ok if options.capturable else None)
    return found, ok


def _directions(blocks: Sequence[Block], gs: Sequence[Matrix], options: ThetaOptions) -> list[Direction]:
    stacks = stacks_of(blocks, gs, more=[(b.flattened, *map(id, b.groups), *_missing(b)) for b in blocks])
    return [Direction.of(stack, gs, options) for stack in stacks]


def _missing(block: Block) -> tuple[bool, ...]:
    return tuple(g is None for g in block.grads)


def _scale(directions: Sequence[Direction], options: ThetaOptions) -> None:
    """Make each nat what the blocks move along, but for ``scales``."""
    if options.normalize == "spectral":
        _flatten([d for d in directions if d.stack.blocks[0].flattened])
    if options.normalize == "trust":
        total = _trust_total(directions, options)
        for d in directions:
            d.scales = trust_scale(total, options.kappa).to(d.nat.device) / d.correction
    for d in directions if options.normalize in ("rms", "spectral") else ():
        flat = options.normalize == "spectral" and d.stack.blocks[0].flattened
        d.scales = rms_scale(d.stack.blocks[0].shape, flat, d.g, d.norms, d.correction) / d.correction


def trust_total(blocks: Sequence[Block], gs: Sequence[Matrix], options: ThetaOptions) -> Tensor:
    """Σ lr₀² m̂ᵀnat (gᵀnat with momentum "after") of the step that ``theta_step`` would take: a scalar."""
    return _trust_total(_directions(blocks, gs, options), options)


def _trust_total(directions: Sequence[Direction], options: ThetaOptions) -> Tensor:
    return scalars([_trust_lengths(d, options).sum() for d in directions]).sum()


def _trust_lengths(d: Direction, options: ThetaOptions) -> Tensor:
    correction = d.correction**2 if options.before else d.correction
    return _lengths(d.stack, d.g, d.nat, options) / correction


def _flatten(directions: Sequence[Direction]) -> None:
    """The polar factor of each nat in its place."""
    exact = all(d.nat.device.type == "cpu" for d in directions)  # elsewhere TF32 may be on
    factors = polar_factors([nat for d in directions for nat in d.nat.unbind()], exact)
    for d in directions:
        d.nat = together([factors.pop(0) for _ in d.stack.blocks])


def _correction(stack: Stack, options: ThetaOptions, like: Tensor) -> Tensor:
    """1 − βᵗ of each block, (count,), with t of this step."""
    beta = stack.blocks[0].beta
    steps = together([b.step for b in stack.blocks]).to(like) + options.averages
    return torch.expm1(steps * (math.log(beta) if beta > 0 else -math.inf)).neg_()


def _x_and_nat(
    stack: Stack, gs: Sequence[Matrix], options: ThetaOptions
) -> tuple[Tensor | LowRank, Tensor | LowRank, Tensor]:
    """g, what m averages, and nat before its bias correction, of ``gs`` for the list that the stack is of."""
    block, g = stack.blocks[0], gs[stack.numbers[0]]
    if isinstance(g, LowRank):
        if options.before:
            return g, g, _low_rank_natural(block, g, options.averages)[None]
        x = block.structure.low_rank_product(g).dense[None].to(block.dtype)
        return g, x, _averaged(stack, x, options.averages)
    whole = stack.matrices(gs)
    if options.before:
        return whole, whole, stacked.product(stack.structures, _averaged(stack, whole, options.averages))
    x = stacked.product(stack.structures, whole)
    return whole, x, _averaged(stack, x, options.averages)


def direction(block: Block, g: Matrix, options: ThetaOptions) -> tuple[Matrix, Tensor]:
    """What m averages, and nat before its bias correction, of one block."""
    _, x, nat = _x_and_nat(Stack([block], [0]), [g], options)
    return x if isinstance(x, LowRank) else x[0], nat[0]


def move_stack(stack: Stack, x: Tensor | LowRank, nat: Tensor, c: Tensor, ok: Tensor | None) -> None:
    """Average x into m and move θ along nat times c (count,), where ``ok``; None: it is. ``nat`` is spent."""
    _average(stack, x, ok)
    delta = nat.mul_(c.to(nat)[:, None, None])
    block = stack.blocks[0]
    for k, (piece, grad, group) in enumerate(zip(stack.split(delta), block.grads, block.groups, strict=True)):
        if grad is not None:
            _move([b.parts[k].of(b.params[k]) for b in stack.blocks], piece, group, ok)


def move(block: Block, x: Matrix, nat: Tensor, c: Tensor | float, ok: Tensor, capturable: bool) -> None:
    """The same of one block and scalar c, which a float c tells to be ``ok``. ``nat`` is spent."""
    scale = c if isinstance(c, Tensor) else nat.new_full((), c)
    given = x if isinstance(x, LowRank) else dense(x)[None]
    move_stack(Stack([block], [0]), given, nat[None], scale[None], ok if capturable else None)


def _averaged(stack: Stack, x: Tensor, times: int) -> Tensor:
    """m with x averaged into it ``times`` times, (count, m, n)."""
    return torch.lerp(together([b.momentum for b in stack.blocks]), x, 1 - stack.blocks[0].beta ** times)


def _average(stack: Stack, x: Tensor | LowRank, ok: Tensor | None) -> None:
    """m ← βm + (1−β)x, in place, where ``ok``."""
    block, momenta = stack.blocks[0], [b.momentum for b in stack.blocks]
    if isinstance(x, LowRank):
        _average_pieces(block, block.momentum, 1 - block.beta)
        return
    if ok is not None:
        x = torch.where(ok.to(x.device), x, together(momenta))
    torch._foreach_lerp_(momenta, list(x.unbind()), 1 - block.beta)
    for b in stack.blocks:
        b.product_version = None


def _average_pieces(block: Block, average: Tensor, weight: float) -> None:
    """Average the block's gradient into (m, n) in place."""
    for view, grad in zip(block.split(average), block.grads, strict=True):
        if grad is not None:  # as every part of a low-rank gradient is there
            view.lerp_(grad, weight)


def _low_rank_natural(block: Block, g: LowRank, times: int) -> Tensor:
    """Q m̂, but for the bias correction, by products of g alone once Q m is known."""
    ensure_product(block)
    product, nat = block.buffers()
    block.structure.low_rank_product(g).into(nat)
    product.lerp_(nat, 1 - block.beta)
    block.product_version = block.structure.version
    return nat.lerp_(product, block.beta ** (times - 1))  # βQ m + (1−β)Q g, or Q m


def ensure_product(block: Block) -> None:
    """Make ``block.product`` Q m."""
    if not block.product_known:
        block.buffers()[0].copy_(block.structure.product(block.momentum))
        block.product_version = block.structure.version


def _still(g: Tensor | LowRank, norms: Tensor) -> Tensor:
    """Where g is all zero, since what is left of m would fade and be blown up, or nat is: (count,)."""
    if isinstance(g, LowRank):  # which is not zero
        return norms == 0
    return (torch.linalg.vector_norm(g, math.inf, dim=(1, 2)) == 0) | (norms == 0)


def rms_scale(shape: tuple[int, int], flat: bool, g: Tensor | LowRank, norms: Tensor, correction: Tensor) -> Tensor:
    """c of blocks of one shape, (count,): 0 where they should not move.

    A full polar factor (``flat``), or a nat left as it is, gets the size of "rms".
    """
    size = RMS * (max(shape) if flat else shape[0] * shape[1]) ** 0.5
    return torch.where(_still(g, norms), 0, size * (correction if flat else 1 / norms))


def spectral_scale(block: Block, g: Matrix, flat: bool, norm: Tensor, correction: Tensor) -> Tensor:
    """The same of one block: a scalar."""
    given = g if isinstance(g, LowRank) else dense(g)[None]
    return rms_scale(block.shape, flat, given, norm[None], correction[None])[0]


def trust_length(block: Block, g: Matrix, nat: Tensor, options: ThetaOptions) -> Tensor:
    """lr₀² m̂ᵀnat (gᵀnat with momentum "after") before the bias correction, of one block: a scalar."""
    given = g if isinstance(g, LowRank) else dense(g)[None]
    return _lengths(Stack([block], [0]), given, nat[None], options)[0]


def _lengths(stack: Stack, g: Tensor | LowRank, nat: Tensor, options: ThetaOptions) -> Tensor:
    block, weight = stack.blocks[0], 1 - stack.blocks[0].beta ** options.averages
    if isinstance(g, LowRank):
        if options.before:
            paired = block.momentum.clone()
            _average_pieces(block, paired, weight)
            found = dot(paired, nat[0])[None]
        else:
            found = dot(g, nat[0])[None]
    else:
        found = ((_averaged(stack, g, options.averages) if options.before else g) * nat).sum((1, 2))
    return found * block.groups[0]["base_lr"] ** 2


def trust_scale(length: Tensor, kappa: float) -> Tensor:
    """c of all blocks, from the sum of their lengths: a scalar."""
    return (kappa / length.clamp_min(torch.finfo(length.dtype).tiny)).sqrt().clamp_max(1)


def _move(thetas: list[Tensor], delta: Tensor, group: dict, ok: Tensor | None) -> None:
    """θ ← θ − lr·(delta + wd·θ) of tensors (count, *shape), where ``ok``. ``delta`` is spent."""
    lr, decay = group["lr"], group["weight_decay"]
    if decay != 0:
        delta = delta.add_(together(thetas), alpha=decay)
    if isinstance(lr, Tensor):
        delta, lr = delta.mul_(lr), 1.0
    if ok is not None:
        delta = torch.where(ok.to(delta.device), delta, 0)
    if thetas[0].dtype == delta.dtype:
        torch._foreach_add_(thetas, list(delta.unbind()), alpha=-lr)
    else:  # a launch each, of the above
        torch._foreach_copy_(thetas, list(torch.sub(together(thetas), delta, alpha=lr).unbind()))
