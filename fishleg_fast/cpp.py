"""The ``cpp`` backend: the passes over memory of a step in C++ (csrc/cpu), on torch's threads.

Products of Kron blocks are packed ones (``packed``) where the processor has an engine for them, and torch's elsewhere.

The reference takes an operation of torch for every few elements' arithmetic and every block; here all blocks take two
passes, one for the norms and one that writes. Rules and signatures are those of ``reference.steps``.

A convolution's weight in ``channels_last`` or another layout that is no matrix is copied there and back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import native, packed
from .anchoring import anchor as anchor
from .plan import CODES, Plan, _dtype, plan_of
from .reference import steps
from .reference.products import Vectors
from .reference.thin import Image, Matrix, Split, Thin, dense

if TYPE_CHECKING:
    from .blocks import Block

PRODUCT, THIN, DIAGONAL, AFTER, AFTER_DIAGONAL = range(5)  # Source of csrc/cpu/table.h


def available(device: torch.device | None = None, dtype: torch.dtype | None = None) -> tuple[bool, str]:
    """Where the extension is built, for parameters on the CPU."""
    if device is not None and device.type != "cpu":
        return False, f"it runs on the CPU, not on {device.type}"
    ok, reason = native.available()
    return ok, f"C++, compiled for {native.extension().instruction_set()}" if ok else reason


def refresh(blocks: Sequence[Block], vectors: Sequence[Vectors] | None = None) -> None:
    """As ``reference.steps.refresh``; of packed blocks when they are multiplied."""
    counts = vectors or [None] * len(blocks)
    rest = [(b, count) for b, count in zip(blocks, counts, strict=True) if not packed.takes(b)]
    steps.refresh([b for b, _ in rest], [count for _, count in rest])


def qv(blocks: Sequence[Block], us: Sequence[Matrix]) -> list[Matrix]:
    """As ``reference.steps.qv``."""
    mine = [k for k, block in enumerate(blocks) if packed.takes(block)]
    others = sorted(set(range(len(blocks))).difference(mine))
    found = dict(zip(mine, packed.qv([blocks[k] for k in mine], [us[k] for k in mine]), strict=True))
    found |= zip(others, steps.qv([blocks[k] for k in others], [us[k] for k in others]), strict=True)
    return [found[k] for k in range(len(blocks))]


def inner(xs: Sequence[Matrix], ys: Sequence[Matrix]) -> Tensor:
    """⟨x, y⟩ over all blocks together: a scalar, float64 where any block is."""
    left, right = _tensors(xs), _tensors(ys)
    dtypes = None if left is None or right is None else [*map(_dtype, left)]
    if left is None or right is None or dtypes is None or dtypes != [*map(_dtype, right)]:
        return steps.inner(xs, ys)
    addresses = [*map(Tensor.data_ptr, left)]
    others = [*map(Tensor.data_ptr, right)]
    codes = [CODES[dtype] for dtype in dtypes]
    sum_ = native.extension().inner(addresses, others, [*map(Tensor.numel, left)], codes, torch.get_num_threads())
    return torch.tensor(sum_, dtype=torch.float64 if torch.float64 in dtypes else torch.float32)


def _tensors(xs: Sequence[Matrix]) -> list[Tensor] | None:
    """``xs`` where the C++ code takes them: tensors without gaps, of one of its types."""
    whole = [x.dense if isinstance(x, Split) else x for x in xs]
    tensors = [x for x in whole if isinstance(x, Tensor) and x.is_contiguous() and x.dtype in CODES]
    return tensors if len(tensors) == len(whole) else None


def theta_step(
    blocks: Sequence[Block],
    gs: Sequence[Matrix],
    *,
    momentum: str = "before",
    nesterov: bool = False,
    normalize: str | None = "rms",
    kappa: float = 1e-3,
    capturable: bool = False,
) -> tuple[Tensor, Tensor]:
    """As ``reference.steps.theta_step``."""
    plan = plan_of(blocks)
    plan.place(gs)
    plan.set_rates()
    plan.set_mode(DIAGONAL if momentum == "before" else AFTER_DIAGONAL)
    times, threads = 2 if nesterov else 1, torch.get_num_threads()
    given = _give(plan, gs, momentum, times, threads)
    norms = torch.empty(len(blocks), dtype=torch.float64)
    ok = plan.native.theta_step(norms.data_ptr(), times, normalize, kappa, threads)
    del given
    if ok:
        plan.bring_back()
        torch.autograd.graph.increment_version(plan.moved)
        for k in plan.formed:
            follows = momentum == "before" and isinstance(gs[k], Thin)
            blocks[k].product_version = blocks[k].structure.version if follows else None
    return norms.to(plan.dtype), torch.tensor(ok)


def _give(plan: Plan, gs: Sequence[Matrix], momentum: str, times: int, threads: int) -> list[Tensor]:
    """Give the plan the products with Q. Returns the tensors that it points to."""
    before = momentum == "before"
    blocks = plan.blocks
    averaged = [k for k in plan.formed if before and not isinstance(gs[k], Thin)]
    if averaged:
        outs = [0] * len(blocks)
        for k in averaged:
            outs[k] = blocks[k].room().data_ptr()
        plan.native.average(outs, times, threads)
    kept = []
    mine = [k for k in plan.formed if before and packed.takes(blocks[k])]
    _give_packed(plan, gs, mine)
    rest = sorted(set(plan.formed).difference(mine))
    after = {} if before else dict(zip(rest, qv([blocks[k] for k in rest], [gs[k] for k in rest]), strict=True))
    for k in rest:
        block, g, product = blocks[k], gs[k], 0
        if k in after:
            source, given = AFTER, dense(after[k]).to(block.dtype)
        elif isinstance(g, Thin):
            steps.know_product(block)
            source, given = THIN, _image(block, g)
            product = block.buffers()[0].data_ptr()
        else:
            source, given = PRODUCT, block.structure.product(block.room())
        given = given.contiguous()
        kept.append(given)
        plan.native.give(k, source, given.data_ptr(), product)
    return kept


def _give_packed(plan: Plan, gs: Sequence[Matrix], mine: Sequence[int]) -> None:
    """Give the plan the products of packed blocks: of thin gradients as panels, of which it makes Q g where needed."""
    thin = {k: g for k in mine if isinstance(g := gs[k], Thin)}
    whole = [plan.blocks[k] for k in mine if k not in thin]
    unknown = [b for k in thin if not (b := plan.blocks[k]).product_known]
    rooms = [b.room() for b in whole]
    moments = [b.momentum for b in unknown]
    packed.product([*whole, *unknown], [*rooms, *moments], [*rooms, *(b.buffers()[0] for b in unknown)])
    for b in unknown:
        b.product_version = b.structure.version
    for k, room in zip([k for k in mine if k not in thin], rooms, strict=True):
        plan.native.give(k, PRODUCT, room.data_ptr(), 0)
    if thin:
        blocks = [plan.blocks[k] for k in thin]
        products = packed.thin_products(blocks, list(thin.values()))
        rows = [
            (k, left.address, right.address, left.columns, packed.room(b), b.buffers()[0].data_ptr())
            for k, b, (left, right) in zip(thin, blocks, products, strict=True)
        ]
        plan.native.give_packed(packed.packed_of(blocks[0]).engine, rows)


def _image(block: Block, g: Thin) -> Tensor:
    """Q g of a thin g, (m, n), in the block's scratch memory."""
    block.structure.thin_product(g).into(block.room())
    return block.room()


def lambda_step(
    blocks: Sequence[Block],
    us: Sequence[Matrix],
    vs: Sequence[Matrix],
    fvs: Sequence[Matrix],
    *,
    damping: float,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    precondition: bool = False,
    learn_scale: bool = True,
    capturable: bool = False,
) -> tuple[Tensor, Tensor]:
    """As ``reference.steps.lambda_step``."""
    plain = [_native(block) for block in blocks]
    mine = [k for k, block in enumerate(blocks) if plain[k] and packed.takes(block)]
    met: dict[int, packed.Thins] = {}
    for k in mine:
        u, v = us[k], vs[k]
        if isinstance(u, Thin) and isinstance(v, Image) and not precondition:
            met[k] = packed.Thins(u, v, fvs[k])
    rest = [k for k in range(len(blocks)) if k not in met]
    dots = steps.dots([us[k] for k in rest], [vs[k] for k in rest], [fvs[k] for k in rest])
    for thins in met.values():
        dots = dots + thins.dots()
    loss, power, scale = steps.aux_loss(dots, damping, learn_scale)
    gradients: dict[int, Mapping[str, Any]] = {
        k: steps.aux_gradients(blocks[k], us[k], vs[k], fvs[k], damping, scale, precondition)
        for k in sorted(set(rest).difference(mine))
    }
    ws: list[Any] = []
    for k in mine:
        if k in met:
            ws.append(met[k].residual(damping, 1.0 if scale is None else float(scale)))
        else:
            ws.append(steps.whole(steps.residual(us[k], vs[k], fvs[k], damping, scale)))
    if precondition:
        ws = [*packed.qv([blocks[k] for k in mine], ws)]
    found = packed.gradients([blocks[k] for k in mine], [met.get(k, us[k]) for k in mine], ws)
    gradients |= zip(mine, found, strict=True)
    ours = [(b, gradients[k]) for k, b in enumerate(blocks) if plain[k]]
    others = [(b, gradients[k]) for k, b in enumerate(blocks) if not plain[k]]
    ok = bool(torch.isfinite(loss)) and bool(power != 0)
    ok = ok and all(bool(torch.isfinite(g).all()) for _, grads in others for g in grads.values())
    ok = ok and _adam(ours, float(lr), betas, eps)
    packed.forget([blocks[k] for k in mine if k not in met])
    if ok:
        for block, grads in others:
            steps.adam_step(block, dict(grads), lr, betas, eps, torch.tensor(True))
    return loss, torch.tensor(ok)


def _native(block: Block) -> bool:
    """Whether all of λ is as the C++ code takes it, which that of a user's layer need not be."""
    aux = block.structure.fishleg_aux
    tensors = [t for name in aux for t in (aux[name], block.exp_avg[name], block.exp_avg_sq[name])]
    return all(t.dtype == block.dtype and t.is_contiguous() for t in tensors)


def _adam(
    chosen: Sequence[tuple[Block, Mapping[str, Tensor | packed.Gradient]]],
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> bool:
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
    if not native.extension().adam_step(rows, lr, *betas, eps, torch.get_num_threads(), engine):
        return False
    torch.autograd.graph.increment_version(written)
    for block, _ in chosen:
        block.aux_step.add_(1)
    return True
