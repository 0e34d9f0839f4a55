"""The ops by our own CUDA kernels (csrc/cuda): a plan for a list of blocks, and one call a step.

Theirs are ``Kron`` and ``Diagonal`` blocks with λ in float32, dense factors, and parameters and gradients in float32,
bfloat16 or float16, read and written where they are. ``why_outside`` says which blocks are not: those go through the
reference's functions in the same op, with the same decision, norms and trust scale. Nothing waits for the device,
but for counters of steps that are on the CPU (``capturable=False``).

A plan has one workspace: steps of one optimizer on several streams have to be ordered by the caller. ``refresh`` always
forms both P and S of a block. The kernels have been tested as compiled for the CPU (tests/cuda_emulation.py) and by
ptxas's report, but not on a device yet.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import native, reference
from .blocks import Block
from .cuda_plans import TYPES, Known, Op, Plan, Views, known, machine, plan_of, why_outside
from .reference import steps
from .reference.products import Vectors
from .reference.steps import anchor as anchor
from .reference.thin import Matrix, Split, Thin, dense, dot, is_zero

NORMALIZE = {None: 0, "rms": 1, "trust": 2}
LEAST_CAPABILITY = (8, 0)
ALIGNED = 4  # entries: rows of P and S start at multiples of 16 bytes, and are copied 16 bytes at a time instead of 4


def available(device: torch.device | None = None, dtype: torch.dtype | None = None) -> tuple[bool, str]:
    """Whether the extension has CUDA kernels and a device for them, and why not."""
    ok, reason = native.available()
    if not ok:
        return False, reason
    if not native.features()["cuda"]:
        return native.cuda_status()
    if device is not None and device.type != "cuda":
        return False, f"its kernels are for CUDA devices, not for {device.type}"
    if dtype is not None and dtype not in TYPES:
        return False, f"it has no kernels for parameters of {dtype}"
    if not torch.cuda.is_available():
        return False, f"torch finds no CUDA device ({native.cuda_status()[1]})"
    ok, detail = native.cuda_status()
    if ok and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return False, f"its kernels need compute capability {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} (A100) or newer"
    return ok, detail


def refresh(blocks: Sequence[Block], vectors: Sequence[Vectors] | None = None) -> None:
    """Bring every block's cached products (P and S) up to date with its λ. Reading them does so too.

    ``vectors`` as the reference has it, for blocks outside; of the others both products are always formed.
    """
    counts: Sequence[Vectors] = vectors or [None] * len(blocks)
    ours, facts = [], []
    for block, count in zip(blocks, counts, strict=True):
        found = known(block)
        if why_outside(found) is not None:
            block.structure.refresh(count)
        else:
            ours.append(block)
            facts.append(found)
    _form(ours, facts)


def _form(blocks: Sequence[Block], facts: Sequence[Known]) -> None:
    """P and S of blocks that are not outside, where they are not today's."""
    stale = [
        k for k, (b, f) in enumerate(zip(blocks, facts, strict=True)) if f.kronecker and not b.structure.holds("P", "S")
    ]
    if not stale:
        return
    ours = [blocks[k] for k in stale]
    plan = plan_of(Op.REFRESH, ours, [facts[k] for k in stale], [None] * len(ours))
    caches = []
    for block in ours:
        aux = block.structure.fishleg_aux
        cache = block.structure.rooms(ALIGNED, P=aux["R"], S=aux["L"])
        plan.point(aux["R"], aux["L"])
        for product in (cache["P"], cache["S"]):
            plan.pointers += (product.data_ptr(), max(product.stride(0), product.shape[0]))
        caches.append(cache)
    plan.native.refresh(plan.stream, plan.lists[0])
    plan.begin()
    for block, cache in zip(ours, caches, strict=True):
        block.structure.adopt(cache)


def _prepare(
    op: Op, blocks: Sequence[Block], us: Sequence[Matrix], vs: Sequence[Matrix | None] | None = None
) -> tuple[Plan | None, list[Known], list[Views | None]]:
    """A plan, with P and S formed, and where each u is, None for a block outside; no plan where all are outside."""
    facts = [known(b) for b in blocks]
    views: list[Views | None] = []
    for block, found, u, v in zip(blocks, facts, us, vs or [None] * len(blocks), strict=True):
        outside = why_outside(found, u, v, learning=op is Op.LAMBDA) is not None
        views.append(None if outside else Views(block, found, u))
    inside = [k for k, view in enumerate(views) if view is not None]
    if not inside:
        return None, facts, views
    _form([blocks[k] for k in inside], [facts[k] for k in inside])
    return plan_of(op, blocks, facts, views), facts, views


def qv(blocks: Sequence[Block], us: Sequence[Matrix]) -> list[Matrix]:
    """Q u for each block, thin where u is (which ``structure.thin`` has to allow)."""
    plan, facts, views = _prepare(Op.QV, blocks, us)
    outs: list[Matrix] = []
    for block, found, view, u in zip(blocks, facts, views, us, strict=True):
        if plan is None or view is None:
            outs.append(reference.qv([block], [u])[0])
            continue
        out = torch.empty(block.shape, dtype=torch.float32, device=block.momentum.device)
        plan.pointers += found.operator(block)
        plan.point(found.outer(block), out)
        plan.take(view)
        outs.append(out)
    if plan is not None:
        plan.native.qv(plan.stream, plan.workspace.data_ptr(), plan.lists[0])
        plan.begin()
    return outs


def inner(xs: Sequence[Matrix], ys: Sequence[Matrix]) -> Tensor:
    """⟨x, y⟩ over all blocks together: a scalar, float64 where any block is."""
    pairs: list[tuple[Tensor, Tensor]] = []
    others: list[Tensor] = []
    for x, y in zip(xs, ys, strict=True):
        found = _pairs(x, y)
        if found is None:
            others.append(dot(x, y))
        else:
            pairs += found
    if not pairs or any(t.dtype == torch.float64 for t in others):
        return reference.inner(xs, ys)
    device, (extension, _, stream) = pairs[0][0].device, machine()
    entries = extension.cuda_tile_entries
    tiles = sum(-(-x.numel() // entries) for x, _ in pairs)
    sums = torch.zeros if others else torch.empty
    room = sums(tiles + len(others), 3, dtype=torch.float64, device=device)
    if others:
        room[tiles:, 0] = torch.stack([t.to(device, torch.float64) for t in others])
    out = torch.empty((), dtype=torch.float32, device=device)
    flat = [t for pair in pairs for t in pair]
    extension.cuda_inner(
        device.index or 0,
        stream(device),
        array("q", [t.data_ptr() for t in flat]),
        array("q", [x.numel() for x, _ in pairs]),
        array("q", [TYPES[t.dtype] for t in flat]),
        room.data_ptr(),
        len(others),
        out.data_ptr(),
    )
    return out


def _pairs(x: Matrix, y: Matrix) -> list[tuple[Tensor, Tensor]] | None:
    """Pieces of x and y that lie alike, without gaps; None where there are none."""
    if isinstance(x, Split) and isinstance(y, Split):
        if x.block is not y.block or x.scale is not None or y.scale is not None:
            return None
        found = [(g, g) for g in x.block.grads if g is not None]
    elif isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and x.device == y.device:
        found = [(x, y)]
    else:
        return None
    kind = machine().kind
    fit = all(t.is_contiguous() and t.dtype in TYPES and t.device.type == kind for pair in found for t in pair)
    return found if fit else None


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
    """m ← βm + (1−β)g; nat = Q m̂; θ ← θ − lr·(c·nat + wd·θ), in place: see ``reference.steps.theta_step``."""
    options: dict[str, Any] = {
        "momentum": momentum, "nesterov": nesterov, "normalize": normalize, "kappa": kappa, "capturable": capturable,
    }  # fmt: skip
    plan, facts, views = _prepare(Op.THETA, blocks, gs)
    if plan is None:
        return reference.theta_step(blocks, gs, **options)
    ours = [b for b, view in zip(blocks, views, strict=True) if view is not None]
    times, before = 2 if nesterov else 1, momentum == "before"
    outside: list[tuple[int, Block, Matrix, Tensor]] = []
    for k, (block, found, g, view) in enumerate(zip(blocks, facts, gs, views, strict=True)):
        step = block.step if capturable and block.step.device == plan.device else None
        base_lr = 1.0 if view is None else block.groups[0]["base_lr"]  # which the sums of a block outside contain
        plan.numbers += (block.beta, base_lr, 0.0 if step is not None else block.step.item())
        if view is None:
            x, nat, sums = _outside_theta(block, g, momentum, times, normalize == "trust")
            plan.external[len(outside)] = sums.to(plan.device)
            outside.append((k, block, x, nat))
            plan.point(step)
            continue
        plan.point(block.momentum)
        plan.pointers += found.operator(block)
        plan.point(found.outer(block), step)
        plan.take(view)
        for part, grad, group in zip(block.parts, block.grads, block.groups, strict=True):
            lr = group["lr"]
            on_device = isinstance(lr, Tensor) and lr.device == plan.device
            plan.point(None if grad is None else part.of(part.param), plan.hold(lr.float()) if on_device else None)
            plan.numbers += (0.0 if on_device else float(lr), group["weight_decay"])
    norms = torch.empty(len(blocks), dtype=torch.float32, device=plan.device)
    wide = norms.double() if any(b.dtype == torch.float64 for b in blocks) else None
    ok = torch.empty((), dtype=torch.bool, device=plan.device)
    plan.native.theta_step(
        plan.stream, plan.workspace.data_ptr(), *plan.lists, not before, times, NORMALIZE[normalize],
        kappa, norms.data_ptr(), 0 if wide is None else wide.data_ptr(), ok.data_ptr(),
    )  # fmt: skip
    plan.begin()
    for k, block, x, nat in outside:
        steps.move(block, x, nat, plan.scales[k], ok, True)
    for block in ours:
        block.product_version = None
    written = [p.param for b in ours for p, g in zip(b.parts, b.grads, strict=True) if g is not None]
    torch.autograd.graph.increment_version([*written, *(b.momentum for b in ours)])
    _count(ours, "step", ok, {id(b) for b in ours} if capturable else set(), plan.device)
    if not capturable and not ok:
        for block in blocks:
            block.product_version = None  # it is ahead of m
    return norms if wide is None else wide, ok


def _count(blocks: Sequence[Block], name: str, ok: Tensor, counted: set[int], device: torch.device) -> None:
    """Counters of steps that the kernels have not advanced: those on the CPU."""
    for block in blocks:
        counter: Tensor = getattr(block, name)
        if id(block) not in counted or counter.device != device:
            counter.add_(ok.to(counter.device))


def _outside_theta(block: Block, g: Matrix, momentum: str, times: int, trust: bool) -> tuple[Matrix, Tensor, Tensor]:
    """What m averages, nat, and (‖nat‖², lr₀²⟨m̂ or g, nat⟩, whether g is not zero), by the reference's functions."""
    x, nat = steps.direction(block, g, momentum, times)
    device = nat.device
    power = steps.trust_length(block, g, nat, momentum, times) if trust else torch.zeros((), device=device)
    moving = torch.ones((), device=device) if isinstance(g, Thin) else ~is_zero(dense(g))
    norm = torch.linalg.vector_norm(nat).double()
    return x, nat, torch.stack([norm.square(), power.double(), moving.double()])


def lambda_step(
    blocks: Sequence[Block],
    us: Sequence[Matrix],
    vs: Sequence[Matrix],  # Q u
    fvs: Sequence[Matrix],  # F v
    *,
    damping: float,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    precondition: bool = False,
    learn_scale: bool = True,
    capturable: bool = False,
) -> tuple[Tensor, Tensor]:
    """One Adam step of every block's λ on 𝒜 = ½ vᵀ(F+γI)v − uᵀv, in place: see ``reference.steps.lambda_step``."""
    plan, facts, views = _prepare(Op.LAMBDA, blocks, us, vs)
    if plan is None:
        return reference.lambda_step(
            blocks, us, vs, fvs, damping=damping, lr=lr, betas=betas, eps=eps, precondition=precondition,
            learn_scale=learn_scale, capturable=capturable,
        )  # fmt: skip
    ours = [b for b, view in zip(blocks, views, strict=True) if view is not None]
    outside: list[tuple[Block, Matrix, Matrix, Tensor]] = []
    for block, found, u, v, fv, view in zip(blocks, facts, us, vs, fvs, views, strict=True):
        if view is None:
            dots = [dot(u, v), dot(v, fv), dot(v, v)]
            plan.external[len(outside)] = torch.stack([d.to(plan.device, torch.float64) for d in dots])
            outside.append((block, u, v, fv))
            continue
        plan.pointers += found.operator(block)
        for name in found.lambdas:
            plan.point(block.structure.fishleg_aux[name], block.exp_avg[name], block.exp_avg_sq[name])
        if not found.kronecker:
            plan.point(None, None, None)
        step = block.aux_step if capturable and block.aux_step.device == plan.device else None
        plan.point(plan.hold(dense(v).float().contiguous()), plan.hold(dense(fv).float().contiguous()), step)
        plan.numbers.append(0.0 if step is not None else block.aux_step.item())
        plan.take(view)
    loss, alpha = (torch.empty((), dtype=torch.float32, device=plan.device) for _ in range(2))
    ok = torch.empty((), dtype=torch.bool, device=plan.device)
    workspace = plan.workspace.data_ptr()
    plan.native.aux_loss(plan.stream, workspace, plan.lists[0], damping, learn_scale, loss.data_ptr(), alpha.data_ptr())
    gradients = []
    for i, (block, u, v, fv) in enumerate(outside):
        grads = steps.aux_gradients(block, u, v, fv, damping, None if learn_scale else alpha, precondition)
        size = sum(torch.linalg.vector_norm(g).to(plan.device, torch.float64).square() for g in grads.values())
        plan.external_2[i, 0] = size
        gradients.append((block, grads))
    on_device = isinstance(lr, Tensor) and lr.device == plan.device
    pointer = plan.hold(lr.float()).data_ptr() if isinstance(lr, Tensor) and on_device else 0
    plan.native.aux_update(
        plan.stream, workspace, plan.lists[1], damping, precondition, 0.0 if on_device else float(lr), pointer,
        *betas, eps, ok.data_ptr(),
    )  # fmt: skip
    plan.begin()
    for block, grads in gradients:
        steps.adam_step(block, grads, lr, betas, eps, ok)
    torch.autograd.graph.increment_version([t for b in ours for t in b.structure.fishleg_aux.values()])
    _count(ours, "aux_step", ok, {id(b) for b in ours} if capturable else set(), plan.device)
    return loss, ok
