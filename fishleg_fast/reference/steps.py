"""The ops: functions over lists of blocks, in plain torch. Every backend has these, with these signatures.

They are the ground truth that other backends are tested against, and the fallback where there is none.
A ``Matrix`` is a tensor (m, n) in λ's dtype, or the same as a thin product EᵀH (``thin.Thin``), or the gradient in
``block.grads`` (``thin.Split``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.adam import adam

from ..precision import precision_scope
from .products import Aux, Vectors
from .thin import Image, Matrix, Sum, Thin, dense, dot, is_zero

if TYPE_CHECKING:
    from ..blocks import Block
    from ..structure import Shown

RMS = 0.2  # of a normalised update: the convention of Muon's users, under which AdamW's lr roughly carries over


def refresh(blocks: Sequence[Block], vectors: Sequence[Vectors] | None = None) -> None:
    """Bring every block's cached products (P and S) up to date with its λ. Reading them does so too.

    ``vectors``: how many columns P and rows S of each block will be applied to until λ changes; a product that would
    not pay for itself is left out. Without it all are formed.
    """
    for block, count in zip(blocks, vectors or [None] * len(blocks), strict=True):
        block.structure.refresh(count)


def qv(blocks: Sequence[Block], us: Sequence[Matrix]) -> list[Matrix]:
    """Q u for each block, thin where u is (which ``structure.thin`` has to allow)."""
    return [
        b.structure.thin_product(u) if isinstance(u, Thin) else b.structure.product(dense(u))
        for b, u in zip(blocks, us, strict=True)
    ]


def inner(xs: Sequence[Matrix], ys: Sequence[Matrix]) -> Tensor:
    """⟨x, y⟩ over all blocks together: a scalar, float64 where any block is."""
    return _stack([dot(x, y) for x, y in zip(xs, ys, strict=True)]).sum()


def common_dtype(things: Sequence[Tensor | Block]) -> torch.dtype:
    """float64 where anything is, float32 otherwise."""
    return torch.float64 if any(x.dtype == torch.float64 for x in things) else torch.float32


def _stack(scalars: Sequence[Tensor]) -> Tensor:
    """Scalars of whatever dtype and device -> one vector on the first one's device."""
    wide = common_dtype(scalars)
    return torch.stack([s.to(scalars[0].device, wide) for s in scalars])


def theta_step(
    blocks: Sequence[Block],
    gs: Sequence[Matrix],  # (m, n) each: the gradient, negated where the group maximizes
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
    A thin g should not be zero, and be what ``block.grads`` hold too, from which m is averaged. Q m then follows m by
    thin products, as long as λ stays what it is, and is ``block.product``.

    Returns (‖nat‖ of each block (len(blocks),), whether the step was taken: a boolean scalar).
    """
    times = 2 if nesterov else 1  # how often g is averaged into m̂
    xs, nats, corrections = [], [], []
    for block, g in zip(blocks, gs, strict=True):
        x, nat = direction(block, g, momentum, times)
        xs.append(x)
        nats.append(nat)
        corrections.append(1 - block.beta ** _number(block.step + times, capturable))
    norms = _stack([torch.linalg.vector_norm(nat) for nat in nats])
    corrected = _stack(corrections).to(norms) if capturable else norms.new_tensor(corrections)
    norms = norms / corrected
    ok = torch.isfinite(norms).all()
    if not capturable and not ok:
        for block in blocks:
            block.product_version = None  # it is ahead of m
        return norms, ok
    if normalize == "rms":
        scales = rms_scales(gs, nats, norms)
    elif normalize == "trust":
        lengths = [trust_length(b, g, nat, momentum, times) for b, g, nat in zip(blocks, gs, nats, strict=True)]
        total = (_stack(lengths) / (corrected**2 if momentum == "before" else corrected)).sum()
        scales = trust_scale(total, kappa).expand_as(norms)
    else:
        scales = torch.ones_like(norms)
    scales = scales / corrected
    for block, x, nat, c in zip(blocks, xs, nats, scales if capturable else scales.tolist(), strict=True):
        move(block, x, nat, c, ok, capturable)
    return norms, ok


def direction(block: Block, g: Matrix, momentum: str, times: int) -> tuple[Matrix, Tensor]:
    """What m averages, and nat before its bias correction."""
    if momentum == "before":
        return g, _natural(block, g, times)
    x = dense(qv([block], [g])[0]).to(block.dtype)
    return x, _averaged(block, x, times)


def move(block: Block, x: Matrix, nat: Tensor, c: Tensor | float, ok: Tensor, capturable: bool) -> None:
    """Average x into m, count the step and move θ along nat times c, where ``ok``; a float c tells that it is."""
    _average(block, x, ok if capturable else None)
    block.step.add_(ok.to(block.step.device))
    pieces = zip(block.parts, block.split(nat), block.grads, block.groups, strict=True)
    for part, piece, grad, group in pieces:
        if grad is not None:
            _move(part.of(part.param), piece, c, group, ok)


def _number(t: Tensor, capturable: bool) -> Tensor | float:
    return t if capturable else t.item()


def _averaged(block: Block, x: Matrix, times: int) -> Tensor:
    """m with x averaged into it ``times`` times, a new tensor."""
    weight = 1 - block.beta**times
    if not isinstance(x, Thin):
        return torch.lerp(block.momentum, dense(x), weight)
    average = block.momentum.clone()
    _average_pieces(block, average, weight)
    return average


def _average_pieces(block: Block, average: Tensor, weight: float) -> None:
    """Average the block's gradient into (m, n) in place."""
    for view, grad in zip(block.split(average), block.grads, strict=True):
        if grad is not None:  # as every part of a thin gradient is there
            view.lerp_(grad, weight)


def _average(block: Block, x: Matrix, ok: Tensor | None) -> None:
    """m ← βm + (1−β)x, in place, where ``ok``."""
    if isinstance(x, Thin):
        _average_pieces(block, block.momentum, 1 - block.beta)
    else:
        block.product_version = None
        x = dense(x)
        block.momentum.lerp_(x if ok is None else torch.where(ok.to(x.device), x, block.momentum), 1 - block.beta)


def _natural(block: Block, g: Matrix, times: int) -> Tensor:
    """Q m̂, but for the bias correction. Of a thin g by products of g alone, once Q m is known."""
    if not isinstance(g, Thin):
        return block.structure.product(_averaged(block, g, times))
    know_product(block)
    product, nat = block.buffers()
    block.structure.thin_product(g).into(nat)
    product.lerp_(nat, 1 - block.beta)
    block.product_version = block.structure.version
    return nat.lerp_(product, block.beta ** (times - 1))  # βQ m + (1−β)Q g, or Q m


def know_product(block: Block) -> None:
    """Make ``block.product`` Q m."""
    if not block.product_known:
        block.buffers()[0].copy_(block.structure.product(block.momentum))
        block.product_version = block.structure.version


def _constants(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers of ``like``'s kind. A CUDA graph cannot capture their copy from the host."""
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        return torch.stack([like.new_full((), value) for value in values])
    return like.new_tensor(values)


def rms_scales(gs: Sequence[Matrix], nats: Sequence[Tensor], norms: Tensor) -> Tensor:
    """c of each block, (len(blocks),): 0 where g is all zero, since what is left of m would fade and be blown up."""
    zeros = [  # a thin one is not zero
        norms.new_zeros((), dtype=torch.bool) if isinstance(g, Thin) else is_zero(dense(g)).to(norms.device) for g in gs
    ]
    still = torch.stack(zeros) | (norms == 0)
    sizes = _constants([RMS * nat.numel() ** 0.5 for nat in nats], norms)
    return torch.where(still, 0, sizes / norms)


def trust_length(block: Block, g: Matrix, nat: Tensor, momentum: str, times: int) -> Tensor:
    """lr₀² m̂ᵀnat (gᵀnat with momentum "after") before the bias correction: a scalar."""
    paired = _averaged(block, g, times) if momentum == "before" else g
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


def lambda_step(
    blocks: Sequence[Block],
    us: Sequence[Matrix],
    vs: Sequence[Matrix],  # Q u
    fvs: Sequence[Matrix],  # F v, thin only where v is
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
    loss, power, scale = aux_loss(dots(us, vs, fvs), damping, learn_scale)
    all_grads = [
        aux_gradients(b, u, v, fv, damping, scale, precondition)
        for b, u, v, fv in zip(blocks, us, vs, fvs, strict=True)
    ]
    sums = [torch.linalg.vector_norm(g) for grads in all_grads for g in grads.values()]
    ok = torch.isfinite(_stack([*sums, loss])).all() & (power != 0)
    if not capturable and not ok:
        return loss, ok
    for block, grads in zip(blocks, all_grads, strict=True):
        adam_step(block, grads, lr, betas, eps, ok)
    return loss, ok


def dots(us: Sequence[Matrix], vs: Sequence[Matrix], fvs: Sequence[Matrix]) -> Tensor:
    """⟨v, F v⟩, ⟨v, v⟩ and ⟨u, v⟩ over all blocks together: (3,), of no blocks zeros."""
    return torch.stack([inner(vs, fvs), inner(vs, vs), inner(us, vs)]) if us else torch.zeros(3)


def aux_loss(dots: Tensor, damping: float, learn_scale: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(𝒜, uᵀv, α), as ``lambda_step`` has them; α is None for 1."""
    vFv, vv, power = dots
    vFv = vFv + damping * vv  # with γI
    # Sampled Hessians may have negative curvature.
    scale = None if learn_scale else torch.where(vFv > 0, power / vFv, 1)
    return 0.5 * vFv - power, power, scale


def aux_gradients(
    block: Block, u: Matrix, v: Matrix, fv: Matrix, damping: float, scale: Tensor | None, precondition: bool
) -> dict[str, Tensor]:
    """∂⟨w, Q u⟩/∂λ of one block, with w as ``lambda_step`` says and ``scale`` its α."""
    w = residual(u, v, fv, damping, scale)
    if precondition:
        w = block.structure.product(whole(w))
    if isinstance(u, Thin) and isinstance(v, Image) and isinstance(w, Sum):
        return block.structure.thin_gradients(u, v, w)
    return block.structure.gradients(dense(u), whole(w))


def residual(u: Matrix, v: Matrix, fv: Matrix, damping: float, scale: Tensor | None) -> Tensor | Sum:
    """α(F+γI)v − u; of thin u and v without a dense matrix, but that of F v where it is one."""
    if isinstance(u, Thin) and isinstance(v, Image):
        term = Thin(v.E.to(u.E.dtype) * damping, v.H.to(u.H.dtype))
        if scale is not None:
            c = scale.to(u.E)
            fv, term = fv.scaled(c) if isinstance(fv, Thin) else dense(fv) * c, term.scaled(c)
        return Sum.of(fv if isinstance(fv, Thin) else dense(fv), term, u.scaled(-1))
    curved = torch.add(dense(fv), dense(v), alpha=damping)
    return (curved if scale is None else curved.mul_(scale.to(curved))).sub_(dense(u))


def whole(w: Tensor | Sum) -> Tensor:
    if isinstance(w, Tensor):
        return w
    return w.thin.dense if w.whole is None else w.whole + w.thin.dense


def adam_step(
    block: Block, grads: dict[str, Tensor], lr: float | Tensor, betas: tuple[float, float], eps: float, ok: Tensor
) -> None:
    """Adam on the block's λ where ``ok``, by torch's fused kernel: one pass over memory."""
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
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=0.0,
            eps=eps,
            maximize=False,
        )
        torch.autograd.graph.increment_version(target)
    block.aux_step.add_(ok.to(block.aux_step.device))


def anchor(blocks: Sequence[Block], news: Sequence[Shown | Aux], *, decay: float, damping: float) -> None:
    """Q from the moving average of the Fisher's Kronecker factors, to which ``news`` are added with weight 1 − decay.

    Moments that are not finite are left out, and empty ones: Q and the average stay what they are.
    Raises torch.linalg.LinAlgError where an average is not positive semi-definite; that block's λ is then unchanged.
    """
    for block, new in zip(blocks, news, strict=True):
        if new and block.structure.average(block.moments, new, 1 - decay):
            block.moments_weight.mul_(decay).add_(1 - decay)
            start_kfac(block, damping)


def start_kfac(block: Block, damping: float) -> None:
    """Q from the block's average as it is."""
    with precision_scope("highest"):  # of a triangular inverse that λ starts from
        block.structure.start_kfac(block.moments, damping, block.moments_weight.item())
