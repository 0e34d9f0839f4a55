"""The ops: functions over lists of blocks, in plain torch. Every backend has these, with these signatures.

They are the ground truth that other backends are tested against, and the fallback where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..blocks import Block

RMS = 0.2  # of a normalised update: the convention of Muon's users, under which AdamW's lr roughly carries over


def refresh(blocks: Sequence[Block]) -> None:
    """Bring every block's cached products (P and S) up to date with its λ. Reading them does so too."""
    for block in blocks:
        _ = block.structure.cache


def qv(blocks: Sequence[Block], us: Sequence[Tensor]) -> list[Tensor]:
    """Q u for each block; us and the result are (m, n) in λ's dtype."""
    return [
        b.structure.maths.qv(b.structure.fishleg_aux, b.structure.cache, u) for b, u in zip(blocks, us, strict=True)
    ]


def inner(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """⟨x, y⟩ over all blocks together: a scalar, float64 where any block is."""
    dots = [torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(xs, ys, strict=True)]
    return _stack(dots).sum()


def _stack(scalars: Sequence[Tensor]) -> Tensor:
    """Scalars of whatever dtype and device -> one vector on the first one's device."""
    wide = torch.float64 if any(s.dtype == torch.float64 for s in scalars) else torch.float32
    return torch.stack([s.to(scalars[0].device, wide) for s in scalars])


def theta_step(
    blocks: Sequence[Block],
    gs: Sequence[Tensor],  # (m, n) each: the gradient, negated where the group maximizes
    *,
    momentum: str = "before",
    nesterov: bool = False,
    normalize: str | None = "rms",
    kappa: float = 1e-3,
    capturable: bool = False,
) -> tuple[Tensor, Tensor]:
    """m ← βm + (1−β)g; nat = Q m̂ with m̂ = m/(1−βᵗ); θ ← θ − lr·(c·nat + wd·θ), in place (eq. 15 of the talk).

    nesterov: one more average with g: m̂ = (βm + (1−β)g)/(1−βᵗ⁺¹).
    momentum: "before" as above; "after" averages Q g instead, m ← βm + (1−β)Q g and nat = m̂.
    normalize: "rms", c makes each block's root-mean-square 0.2, or is 0 where g is all zero; "trust",
        c = min(1, √(κ/Σ lr₀² m̂ᵀnat)), one for all blocks (gᵀnat for m̂ᵀnat with momentum "after"); None, c = 1.
    Parts whose gradient is None keep their parameters. Where nat is not finite nothing is written.
    capturable: decide that on the device, without a synchronisation.

    Returns (‖nat‖ of each block (len(blocks),), whether the step was taken: a boolean scalar).
    """
    moved, averages, nats = [], [], []
    for block, g in zip(blocks, gs, strict=True):
        beta = block.beta
        x = g if momentum == "before" else qv([block], [g])[0]
        m = torch.lerp(block.momentum, x, 1 - beta)
        ahead = 2 if nesterov else 1
        average = (torch.lerp(m, x, 1 - beta) if nesterov else m) / (
            1 - beta ** _number(block.step + ahead, capturable)
        )
        nats.append(qv([block], [average])[0] if momentum == "before" else average)
        averages.append(average if momentum == "before" else g)
        moved.append(m)
    norms = _stack([torch.linalg.vector_norm(nat) for nat in nats])
    ok = torch.isfinite(norms).all()
    if not capturable and not ok:
        return norms, ok
    scales = _scales(blocks, gs, averages, nats, norms, normalize, kappa)
    for block, m, nat, scale in zip(blocks, moved, nats, scales, strict=True):
        _write(block.momentum, m, ok, capturable)
        _write(block.step, block.step + 1, ok, capturable)
        pieces = zip(block.parts, block.split(nat), block.grads, block.groups, strict=True)
        for part, piece, grad, group in pieces:
            if grad is None:
                continue
            theta = part.of(part.param)
            delta = piece * scale.to(piece.device, piece.dtype)
            if group["weight_decay"] != 0:
                delta.add_(theta, alpha=group["weight_decay"])
            delta.mul_(group["lr"])
            if capturable:
                delta = torch.where(ok.to(delta.device), delta, 0)
            theta.sub_(delta)
    return norms, ok


def _number(t: Tensor, capturable: bool) -> Tensor | float:
    return t if capturable else t.item()


def _write(target: Tensor, value: Tensor, ok: Tensor, capturable: bool) -> None:
    target.copy_(torch.where(ok.to(value.device), value, target) if capturable else value)


def _scales(
    blocks: Sequence[Block],
    gs: Sequence[Tensor],
    averages: Sequence[Tensor],
    nats: Sequence[Tensor],
    norms: Tensor,
    normalize: str | None,
    kappa: float,
) -> Tensor:
    """c of each block: (len(blocks),)."""
    if normalize == "rms":
        # 0 where g is all zero: what is left of m would fade, and at a constant size go on for ever.
        still = torch.stack([(g != 0).any().to(norms.device) for g in gs]).logical_not_() | (norms == 0)
        scales = torch.stack([RMS * nat.numel() ** 0.5 / norm for nat, norm in zip(nats, norms.unbind(), strict=True)])
        return torch.where(still, 0, scales)
    if normalize is None:
        return torch.ones_like(norms)
    lengths = [
        inner([m], [nat]) * b.groups[0]["base_lr"] ** 2 for b, m, nat in zip(blocks, averages, nats, strict=True)
    ]
    length = _stack(lengths).sum().clamp_min(torch.finfo(norms.dtype).tiny)
    return (kappa / length).sqrt().clamp_max(1).to(norms).expand_as(norms)


def lambda_step(
    blocks: Sequence[Block],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],  # Q u
    fvs: Sequence[Tensor],  # F v
    *,
    damping: float,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    precondition: bool = False,
    learn_scale: bool = True,
    capturable: bool = False,
) -> tuple[Tensor, Tensor]:
    """One Adam step of every block's λ on 𝒜 = ½ vᵀ(F+γI)v − uᵀv, in place (eqs. 13 and 14 of the talk).

    ∇λ𝒜 = ⟨w, ∂λ(Q u)⟩ with w = (F+γI)v − u held constant, or Q w in its place with ``precondition``.
    Without ``learn_scale`` it is the gradient at Q's best multiple, w = α(F+γI)v − u with α = uᵀv/vᵀ(F+γI)v: orthogonal
    to v, so that only Q's shape is learned. The 𝒜 returned is that of Q as it is.
    Where a gradient is not finite, or u is zero, nothing is written. Returns (𝒜, whether the step was taken), scalars.
    """
    curved = [torch.add(fv, v, alpha=damping) for v, fv in zip(vs, fvs, strict=True)]  # (F+γI)v
    uQu, vFv = inner(us, vs), inner(vs, curved)
    loss = 0.5 * vFv - uQu
    if not learn_scale:
        alpha = torch.where(vFv > 0, uQu / vFv, 1)  # sampled Hessians may have negative curvature
        curved = [x * alpha.to(x) for x in curved]
    ws = [x.sub_(u) for x, u in zip(curved, us, strict=True)]
    if precondition:
        ws = qv(blocks, ws)
    all_grads = [
        b.structure.maths.grads(b.structure.fishleg_aux, b.structure.cache, u, w)
        for b, u, w in zip(blocks, us, ws, strict=True)
    ]
    sums = [torch.linalg.vector_norm(g) for grads in all_grads for g in grads.values()]
    ok = torch.isfinite(_stack([*sums, loss])).all() & (uQu != 0)
    if not capturable and not ok:
        return loss, ok
    for block, grads in zip(blocks, all_grads, strict=True):
        _adam(block, grads, lr, betas, eps, ok, capturable)
    return loss, ok


def _adam(
    block: Block,
    grads: dict[str, Tensor],
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    ok: Tensor,
    capturable: bool,
) -> None:
    beta1, beta2 = betas
    step = _number(block.aux_step + 1, capturable)
    _write(block.aux_step, block.aux_step + 1, ok, capturable)
    for name, grad in grads.items():
        target = block.structure.fishleg_aux[name]
        m = torch.lerp(block.exp_avg[name], grad, 1 - beta1)
        s = torch.lerp(block.exp_avg_sq[name], grad * grad, 1 - beta2)
        denominator = (s / (1 - beta2**step)).sqrt_().add_(eps)
        update = (m / (1 - beta1**step)).div_(denominator).mul_(lr)
        _write(block.exp_avg[name], m, ok, capturable)
        _write(block.exp_avg_sq[name], s, ok, capturable)
        _write(target, target - update, ok, capturable)
