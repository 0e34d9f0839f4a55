"""The θ step, in plain torch, and its parts, of which other backends take what they have no kernels for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...algebra.low_rank import LowRank
from ...algebra.matrix import Matrix, dense, dot, is_zero
from ...algebra.polar import polar_factors
from ...model.block import Block, advance
from ..protocol import ThetaOptions
from .products import qv, stacked

RMS = 0.2  # of a normalised update: the convention of Muon's users, under which AdamW's lr roughly carries over


def theta_step(blocks: Sequence[Block], gs: Sequence[Matrix], options: ThetaOptions) -> tuple[Tensor, Tensor]:
    """m ← βm + (1−β)g; nat = Q m̂ with m̂ = m/(1−βᵗ); θ ← θ − lr·(c·nat + wd·θ): see ``protocol.Ops``."""
    capturable = options.capturable
    xs, nats, corrections = [], [], []
    for block, g in zip(blocks, gs, strict=True):
        x, nat = direction(block, g, options)
        xs.append(x)
        nats.append(nat)
        corrections.append(1 - block.beta ** _number(block.step + options.averages, capturable))
    norms = stacked([torch.linalg.vector_norm(nat) for nat in nats])
    corrected = stacked(corrections).to(norms) if capturable else norms.new_tensor(corrections)
    norms = norms / corrected
    ok = torch.isfinite(norms).all()
    if not capturable and not ok:
        for block in blocks:
            block.product_version = None  # it is ahead of m
        return norms, ok
    if options.normalize == "rms":
        scales = rms_scales(gs, nats, norms)
    elif options.normalize == "spectral":
        flat = [b.flattened for b in blocks]
        scales = spectral_scales(flat, gs, nats, norms, corrected)
        nats = flattened(flat, nats)
    elif options.normalize == "trust":
        lengths = [trust_length(b, g, nat, options) for b, g, nat in zip(blocks, gs, nats, strict=True)]
        total = (stacked(lengths) / (corrected**2 if options.before else corrected)).sum()
        scales = trust_scale(total, options.kappa).expand_as(norms)
    else:
        scales = torch.ones_like(norms)
    scales = scales / corrected
    for block, x, nat, c in zip(blocks, xs, nats, scales if capturable else scales.tolist(), strict=True):
        move(block, x, nat, c, ok, capturable)
    advance([block.step for block in blocks], ok if capturable else None)
    return norms, ok


def direction(block: Block, g: Matrix, options: ThetaOptions) -> tuple[Matrix, Tensor]:
    """What m averages, and nat before its bias correction."""
    if options.before:
        return g, _natural(block, g, options.averages)
    x = dense(qv([block], [g])[0]).to(block.dtype)
    return x, _averaged(block, x, options.averages)


def move(block: Block, x: Matrix, nat: Tensor, c: Tensor | float, ok: Tensor, capturable: bool) -> None:
    """Average x into m and move θ along nat times c, where ``ok``; a float c tells that it is."""
    _average(block, x, ok if capturable else None)
    pieces = zip(block.parts, block.split(nat), block.grads, block.groups, strict=True)
    for part, piece, grad, group in pieces:
        if grad is not None:
            _move(part.of(part.param), piece, c, group, ok)


def _number(t: Tensor, capturable: bool) -> Tensor | float:
    return t if capturable else t.item()


def _averaged(block: Block, x: Matrix, times: int) -> Tensor:
    """m with x averaged into it ``times`` times, a new tensor."""
    weight = 1 - block.beta**times
    if not isinstance(x, LowRank):
        return torch.lerp(block.momentum, dense(x), weight)
    average = block.momentum.clone()
    _average_pieces(block, average, weight)
    return average


def _average_pieces(block: Block, average: Tensor, weight: float) -> None:
    """Average the block's gradient into (m, n) in place."""
    for view, grad in zip(block.split(average), block.grads, strict=True):
        if grad is not None:  # as every part of a low-rank gradient is there
            view.lerp_(grad, weight)


def _average(block: Block, x: Matrix, ok: Tensor | None) -> None:
    """m ← βm + (1−β)x, in place, where ``ok``."""
    if isinstance(x, LowRank):
        _average_pieces(block, block.momentum, 1 - block.beta)
    else:
        block.product_version = None
        x = dense(x)
        block.momentum.lerp_(x if ok is None else torch.where(ok.to(x.device), x, block.momentum), 1 - block.beta)


def _natural(block: Block, g: Matrix, times: int) -> Tensor:
    """Q m̂, but for the bias correction. Of a low-rank g by products of g alone, once Q m is known."""
    if not isinstance(g, LowRank):
        return block.structure.product(_averaged(block, g, times))
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


def _constants(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers of ``like``'s kind. A CUDA graph cannot capture their copy from the host."""
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        return torch.stack([like.new_full((), value) for value in values])
    return like.new_tensor(values)


def _still(gs: Sequence[Matrix], norms: Tensor) -> Tensor:
    """Where g is all zero, since what is left of m would fade and be blown up, or nat is."""
    nonzero = norms.new_zeros((), dtype=torch.bool)
    zeros = [  # one of low rank is not zero
        nonzero if isinstance(g, LowRank) else is_zero(dense(g)).to(norms.device) for g in gs
    ]
    return torch.stack(zeros) | (norms == 0)


def rms_scales(gs: Sequence[Matrix], nats: Sequence[Tensor], norms: Tensor) -> Tensor:
    """c of each block, (len(blocks),): 0 where it should not move."""
    sizes = _constants([RMS * nat.numel() ** 0.5 for nat in nats], norms)
    return torch.where(_still(gs, norms), 0, sizes / norms)


def flattened(flat: Sequence[bool], nats: Sequence[Tensor]) -> list[Tensor]:
    """The polar factor of each nat that is to give way to it."""
    found = list(nats)
    chosen = [k for k, mine in enumerate(flat) if mine]
    exact = all(nats[k].device.type == "cpu" for k in chosen)  # elsewhere TF32 may be on
    for k, factor in zip(chosen, polar_factors([nats[k] for k in chosen], exact), strict=True):
        found[k] = factor
    return found


def spectral_scales(
    flat: Sequence[bool], gs: Sequence[Matrix], nats: Sequence[Tensor], norms: Tensor, corrected: Tensor
) -> Tensor:
    """c of each block, (len(blocks),): a full polar factor, or a nat left as it is, gets the size of "rms"."""
    entries = [max(nat.shape) if mine else nat.numel() for mine, nat in zip(flat, nats, strict=True)]
    sizes = _constants([RMS * count**0.5 for count in entries], norms)
    factor = torch.where(_constants(flat, norms) != 0, corrected, 1 / norms)
    return torch.where(_still(gs, norms), 0, sizes * factor)


def trust_length(block: Block, g: Matrix, nat: Tensor, options: ThetaOptions) -> Tensor:
    """lr₀² m̂ᵀnat (gᵀnat with momentum "after") before the bias correction: a scalar."""
    paired = _averaged(block, g, options.averages) if options.before else g
    return dot(paired, nat) * block.groups[0]["base_lr"] ** 2


def trust_scale(length: Tensor, kappa: float) -> Tensor:
    """c of all blocks, from the sum of their lengths: a scalar."""
    return (kappa / length.clamp_min(torch.finfo(length.dtype).tiny)).sqrt().clamp_max(1)


def _move(theta: Tensor, nat: Tensor, c: Tensor | float, group: dict, ok: Tensor) -> None:
    """θ ← θ − lr·(c·nat + wd·θ); with a tensor c on the device alone, and only where ``ok``. ``nat`` is spent."""
    lr, decay = group["lr"], group["weight_decay"]
    if isinstance(c, Tensor):
        delta = (nat * c.to(nat)).add_(theta, alpha=decay).mul_(lr)
        theta.sub_(torch.where(ok.to(delta.device), delta, 0))
        return
    if decay != 0:
        nat, c = nat.mul_(c).add_(theta, alpha=decay), 1.0
    theta.add_(nat, alpha=-float(lr) * c)
