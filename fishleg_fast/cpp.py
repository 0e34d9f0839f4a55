"""The ``cpp`` backend: the passes over memory of a step in C++ (csrc/cpu), on torch's threads; products by torch.

The reference takes an operation of torch for every few elements' arithmetic and every block; here all blocks take two
passes, one for the norms and one that writes. Rules and signatures are those of ``reference.steps``.

A convolution's weight in ``channels_last`` or another layout that is no matrix is copied there and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import native
from .reference import steps
from .reference.steps import qv as qv
from .reference.steps import refresh as refresh
from .reference.thin import Matrix, Split, Thin, dense
from .structures import Diagonal

if TYPE_CHECKING:
    from .blocks import Block

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # Dtype of csrc/cpu/table.h
PRODUCT, THIN, DIAGONAL, AFTER, AFTER_DIAGONAL = range(5)  # Source of csrc/cpu/table.h

View = tuple[int, int, int, int]  # address, row stride, column stride, dtype
NOWHERE: View = (0, 0, 0, 0)


def available(device: torch.device | None = None, dtype: torch.dtype | None = None) -> tuple[bool, str]:
    """Where the extension is built, for parameters on the CPU."""
    if device is not None and device.type != "cpu":
        return False, f"it runs on the CPU, not on {device.type}"
    ok, reason = native.available()
    return ok, f"C++, compiled for {native.extension().instruction_set()}" if ok else reason


def inner(xs: Sequence[Matrix], ys: Sequence[Matrix]) -> Tensor:
    """⟨x, y⟩ over all blocks together: a scalar, float64 where any block is."""
    rows, others = [], []
    for x, y in zip(xs, ys, strict=True):
        x, y = (z.dense if isinstance(z, Split) else z for z in (x, y))
        if isinstance(x, Tensor) and isinstance(y, Tensor) and _alike(x, y):
            rows.append((x.data_ptr(), y.data_ptr(), x.numel(), CODES[x.dtype]))
        else:
            others.append((x, y))
    wide = any(code == CODES[torch.float64] for *_, code in rows)
    sum_ = native.extension().inner(rows, torch.get_num_threads())
    total = torch.tensor(sum_, dtype=torch.float64 if wide else torch.float32)
    return total + steps.inner(*zip(*others, strict=True)) if others else total


def _alike(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.dtype in CODES and x.is_contiguous() and y.is_contiguous()


class _Place(NamedTuple):
    """A block's memory in this step, and copies that have to be brought back to parameters."""

    pieces: list[tuple[View, View, bool]]
    kept: list[Tensor | None]  # what the addresses need
    copies: list[tuple[Tensor, Tensor]]  # (parameter, its copy)
    passing: bool  # whether anything is a copy, and so of this step alone


class _Plan:
    """The C++ plan of a list of blocks, and where it was last told that their memory is."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = list(blocks)
        shapes = []
        for block in blocks:
            widths = [part.of(part.param).numel() for part in block.parts]
            m, n = block.shape
            if block.axis:
                widths = [width // m for width in widths]
            rows, columns = (m, n) if block.axis else (1, m)
            shapes.append((block.name, CODES[block.dtype], rows, columns, widths))
        self.native = native.extension().Plan(shapes)
        self.shapes = [(rows, columns, widths) for *_, rows, columns, widths in shapes]
        self._keys: list[Any] = [None] * len(self.blocks)
        self._places: list[_Place] = [_Place([], [], [], False)] * len(self.blocks)
        self._rates: Any = None

    def place(self, gs: Sequence[Matrix]) -> list[_Place]:
        """Tell the plan of all memory that has moved since the step before."""
        for k, (block, g) in enumerate(zip(self.blocks, gs, strict=True)):
            key = _key(block, g)
            if key != self._keys[k] or self._places[k].passing:
                self._keys[k] = key
                self._places[k] = place = self._place(k, block, g)
                d = block.structure.fishleg_aux["d"].data_ptr() if type(block.structure) is Diagonal else 0
                self.native.place(k, block.momentum.data_ptr(), block.step.data_ptr(), d, place.pieces)
        return self._places

    def _place(self, k: int, block: Block, g: Matrix) -> _Place:
        rows, _, widths = self.shapes[k]
        pieces: list[tuple[View, View, bool]] = []
        kept: list[Tensor | None] = []
        copies: list[tuple[Tensor, Tensor]] = []
        passing, first = False, 0
        for part, grad, width in zip(block.parts, block.grads, widths, strict=True):
            param = part.of(part.param.detach())
            whole = param.reshape(rows, width)
            source: Tensor | None
            if isinstance(g, Tensor):  # (m, n), or (m, 1) of parts below each other
                source = g[:, first : first + width] if block.axis else g[first : first + width].T
            else:
                source = grad
            taken = None if source is None else source.reshape(rows, width)
            if whole.data_ptr() != param.data_ptr():
                copies.append((param, whole))
            if source is not None and taken is not None:
                passing = passing or taken.data_ptr() != source.data_ptr()
            kept += [whole, taken]
            pieces.append((_view(whole), NOWHERE if taken is None else _view(taken), grad is not None))
            first += width
        return _Place(pieces, kept, copies, passing or bool(copies))

    def set_rates(self) -> None:
        """lr, weight decay, momentum and lr before any schedule, where they have changed."""
        groups = [group for block in self.blocks for group in block.groups]
        lrs, decays = [float(group["lr"]) for group in groups], [group["weight_decay"] for group in groups]
        firsts = [block.groups[0] for block in self.blocks]
        rates = (lrs, decays, [group["beta"] for group in firsts], [group["base_lr"] for group in firsts])
        if rates != self._rates:
            self._rates = rates
            self.native.set_rates(*rates)


def _view(t: Tensor) -> View:
    return t.data_ptr(), t.stride(0), t.stride(1), CODES[t.dtype]


def _key(block: Block, g: Matrix) -> list[Any]:
    """Changes whenever a parameter or gradient has moved or changed its layout."""
    if isinstance(g, Tensor):
        key: list[Any] = [g.data_ptr(), g.stride(), *(grad is None for grad in block.grads)]
        tensors: list[Tensor | None] = [part.param for part in block.parts]
    else:
        key = []
        tensors = [t for part, grad in zip(block.parts, block.grads, strict=True) for t in (part.param, grad)]
    for t in tensors:
        if t is None:
            key.append(None)
        else:
            key += (t.data_ptr(), t.dtype, True if t.is_contiguous() else t.stride())
    return key


def _plan(blocks: Sequence[Block]) -> _Plan:
    """That of this list of blocks, made anew when the list is another."""
    plan = blocks[0].plan
    if not isinstance(plan, _Plan) or plan.blocks != list(blocks):
        plan = blocks[0].plan = _Plan(blocks)
    return plan


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
    plan = _plan(blocks)
    places = plan.place(gs)
    plan.set_rates()
    times, threads = 2 if nesterov else 1, torch.get_num_threads()
    kept = _give(plan, gs, momentum, times, threads)
    norms = torch.empty(len(blocks), dtype=torch.float64)
    ok = plan.native.theta_step(norms.data_ptr(), times, normalize, kappa, threads)
    del kept
    if ok:
        _written(blocks, gs, momentum)
        for place in places:
            for param, copy in place.copies:
                param.copy_(copy.reshape(param.shape))
    return norms.to(steps.common_dtype(blocks)), torch.tensor(ok)


def _give(plan: _Plan, gs: Sequence[Matrix], momentum: str, times: int, threads: int) -> list[Tensor]:
    """Give the plan each block's product with Q. Returns the tensors that it points to."""
    before = momentum == "before"
    averaged = [
        before and not isinstance(g, Thin) and type(b.structure) is not Diagonal
        for b, g in zip(plan.blocks, gs, strict=True)
    ]
    if any(averaged):
        outs = [b.room().data_ptr() if wanted else 0 for b, wanted in zip(plan.blocks, averaged, strict=True)]
        plan.native.average(outs, times, threads)
    kept: list[Tensor] = []
    for k, (block, g) in enumerate(zip(plan.blocks, gs, strict=True)):
        product = 0
        if type(block.structure) is Diagonal:
            plan.native.give(k, DIAGONAL if before else AFTER_DIAGONAL, 0, 0, 0)
            continue
        if not before:
            source, given = AFTER, dense(qv([block], [g])[0]).to(block.dtype)
        elif isinstance(g, Thin):
            source, given = THIN, steps.thin_image(block, g)
            product = block.buffers()[0].data_ptr()
        else:
            source, given = PRODUCT, block.structure.product(block.room())
        given = given.contiguous()
        kept.append(given)
        plan.native.give(k, source, given.data_ptr(), CODES[given.dtype], product)
    return kept


def _written(blocks: Sequence[Block], gs: Sequence[Matrix], momentum: str) -> None:
    """Tell torch, and the blocks, what the plan has written to."""
    moved = [
        part.param for block in blocks for part, grad in zip(block.parts, block.grads, strict=True) if grad is not None
    ]
    torch.autograd.graph.increment_version(moved)
    for block, g in zip(blocks, gs, strict=True):
        follows = momentum == "before" and isinstance(g, Thin)
        block.product_version = block.structure.version if follows else None


def lambda_step(
    blocks: Sequence[Block],
    us: Sequence[Matrix],
    vs: Sequence[Matrix],
    fvs: Sequence[Tensor],
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
    loss, power, all_grads = steps.aux_gradients(
        blocks, us, vs, fvs, damping=damping, precondition=precondition, learn_scale=learn_scale
    )
    mine = [(b, grads) for b, grads in zip(blocks, all_grads, strict=True) if _plain(b)]
    others = [(b, grads) for b, grads in zip(blocks, all_grads, strict=True) if not _plain(b)]
    ok = bool(torch.isfinite(loss)) and bool(power != 0)
    ok = ok and all(bool(torch.isfinite(g).all()) for _, grads in others for g in grads.values())
    ok = ok and _adam(mine, float(lr), betas, eps)
    if ok:
        for block, grads in others:
            steps.adam_step(block, grads, lr, betas, eps, torch.tensor(True))
    return loss, torch.tensor(ok)


def _plain(block: Block) -> bool:
    """Whether all of λ is as the C++ code takes it, which that of a user's layer need not be."""
    aux = block.structure.fishleg_aux
    tensors = [t for name in aux for t in (aux[name], block.exp_avg[name], block.exp_avg_sq[name])]
    return all(t.dtype == block.dtype and t.is_contiguous() for t in tensors)


def _adam(chosen: Sequence[tuple[Block, dict[str, Tensor]]], lr: float, betas: tuple[float, float], eps: float) -> bool:
    """Adam on the λ of blocks; whether it was taken."""
    rows, kept, written = [], [], []
    for block, grads in chosen:
        count = float(block.aux_step) + 1
        for name, grad in grads.items():
            value = block.structure.fishleg_aux[name]
            if grad.dtype not in (block.dtype, torch.bfloat16):
                grad = grad.to(block.dtype)
            grad = grad.contiguous()
            kept.append(grad)
            written.append(value)
            addresses = (t.data_ptr() for t in (value, block.exp_avg[name], block.exp_avg_sq[name], grad))
            rows.append(
                (f"{block.name}.{name}", value.numel(), *addresses, CODES[grad.dtype], CODES[value.dtype], count)
            )
    if not native.extension().adam_step(rows, lr, *betas, eps, torch.get_num_threads()):
        return False
    torch.autograd.graph.increment_version(written)
    for block, _ in chosen:
        block.aux_step.add_(1)
    return True
