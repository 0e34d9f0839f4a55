"""What the host does for a λ step: rows and partial sums of all blocks, and the launches of its kernels in order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import reference
from ..blocks import Block
from ..reference import steps
from ..reference.thin import Matrix, Thin, dense
from .configurations import ELEMENTWISE, INNER, shape_class, tile
from .diagonal import diagonal_adam_kernel, diagonal_sums_kernel
from .factors import Factors
from .lambda_kernels import KIND, commit_kernel, gradients_kernel, products_kernel
from .launch import capability, launch, processors
from .products import left_kernel
from .rows import DTYPES, Rows, kinds_of, pieces
from .symmetric import adopt, factor_rows, pair_kernel, refresh_all, square_tile
from .table import padded, schedule, tiles, upload, workspace


def _flat(t: Tensor) -> Tensor:
    """(m, n) with unit stride of columns: a copy where they are not next to each other."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def covered(block: Block, found: str | None, u: Matrix, v: Matrix) -> str | None:
    """Its kind ``found``, but for what λ's kernels leave to the reference."""
    thin = isinstance(u, Thin) or isinstance(v, Thin)
    return None if thin or "A" in block.structure.fishleg_aux else found


@dataclass
class Group:
    """Blocks that share launches: u of one dtype, one precision."""

    precision: str
    rows: Rows
    again: Rows  # the same with Q w in place of F v
    config: dict = field(default_factory=dict)  # of products
    factors: Factors = field(default_factory=Factors)
    members: list[Block] = field(default_factory=list)  # of Kron's kind, one a row
    biases: list[tuple[float, float]] = field(default_factory=list)  # of each factor


class Plan:
    """One λ step."""

    def __init__(
        self,
        blocks: Sequence[Block],
        us: Sequence[Matrix],
        vs: Sequence[Matrix],
        fvs: Sequence[Matrix],
        kinds: Sequence[str | None],
        betas: tuple[float, float],
        precondition: bool,
        capturable: bool,
    ) -> None:
        self.blocks, self.us, self.vs, self.kinds, self.betas = blocks, us, vs, kinds, betas
        self.precondition, self.capturable = precondition, capturable
        self.device = next(b for b, k in zip(blocks, kinds, strict=True) if k).momentum.device
        self.fvs = [_flat(dense(fv).to(torch.float32)) for fv in fvs]
        self.dot_slots = self.square_slots = 0
        self.groups: list[Group] = []
        self.alive: list[Tensor] = []
        # By dtype of u: rows, (row, its first tile's number in the block), Adam's bias corrections.
        self.diagonals: dict[torch.dtype, tuple[Rows, list, list]] = {}
        # Slots that sums and squares have in common come first: Diagonal's, then the reference's.
        dtypes = {}
        for index, found in enumerate(kinds):
            if found is not None:
                grads, _ = pieces(blocks[index], us[index])
                dtypes[index] = next((t.dtype for t in grads if t is not None), torch.float32)
        for index, found in enumerate(kinds):
            if found == "diagonal":
                self._add_diagonal(index, dtypes[index])
        self.slot_of = {index: self._take() for index, found in enumerate(kinds) if found is None}
        self.square_slots = self.dot_slots
        by_key: dict[tuple, list[int]] = {}
        for index, found in enumerate(kinds):
            if found == "kron":
                by_key.setdefault((dtypes[index], blocks[index].structure.precision), []).append(index)
        for (dtype, precision), indices in by_key.items():
            self._add_group(dtype, precision, indices)
        empty = lambda *shape: torch.empty(shape, dtype=torch.float32, device=self.device)
        self.dots, self.squares, self.loss = empty(2, self.dot_slots), empty(self.square_slots), empty()
        self.ok = torch.empty((), dtype=torch.bool, device=self.device)

    def _take(self, count: int = 1) -> int:
        start, self.dot_slots = self.dot_slots, self.dot_slots + count
        return start

    def _on_device(self, block: Block) -> bool:
        return block.aux_step.device == block.momentum.device and (
            self.capturable or block.aux_step.device.type == "cuda"
        )

    def _bias(self, block: Block) -> tuple[float, float]:
        if self._on_device(block):
            return 1.0, 1.0
        t = block.aux_step.item() + 1
        return 1 - self.betas[0] ** t, 1 - self.betas[1] ** t

    def _common(self, index: int) -> dict:
        block = self.blocks[index]
        grads, scale = pieces(block, self.us[index])
        dtype = next((t.dtype for t in grads if t is not None), torch.float32)
        grads = [None if t is None else t.to(dtype if dtype in DTYPES else torch.float32) for t in grads]
        if scale is not None:
            scale = scale.to(self.device, torch.float32)
            self.alive.append(scale)
        v = _flat(dense(self.vs[index]))
        self.alive.append(v)
        return {"grads": grads, "scale": scale, "v": v, "step": block.aux_step if self._on_device(block) else None}

    def _add_diagonal(self, index: int, dtype: torch.dtype) -> None:
        block, common = self.blocks[index], self._common(index)
        aux, fv, v = block.structure.fishleg_aux["d"], self.fvs[index], common.pop("v")
        moments = block.exp_avg["d"], block.exp_avg_sq["d"]
        rows, numbers, biases = self.diagonals.setdefault(dtype, (Rows(G=dtype), [], []))
        grads = common.pop("grads")
        if block.axis == 1:
            n = block.shape[1] - (len(block.parts) > 1)
            parts = [(block.shape, grads, n, slice(None), False)]
        else:
            parts, start = [], 0
            for part, g in zip(block.parts, grads, strict=True):
                count = part.of(part.param).numel()
                parts.append(((1, count), [g], count, slice(start, start + count), True))
                start += count
        counts = [-(-p[0][0] // ELEMENTWISE[0]) * -(-p[0][1] // ELEMENTWISE[1]) for p in parts]
        slot, number = self._take(sum(counts)), 0
        for k, (shape, gs, cols, piece, vector) in enumerate(parts):
            numbers.append((len(rows), number))
            biases.append(self._bias(block))
            rows.add(
                shape=shape, own=None, A=aux[piece], x=fv[piece], v=v[piece], grads=gs, params=(), cols=cols, slot=slot,
                slots=sum(counts), first=k == 0, vector=vector, moments=tuple(t[piece] for t in moments), **common,
            )  # fmt: skip
            number += counts[k]

    def _add_group(self, dtype: torch.dtype, precision: str, indices: list[int]) -> None:
        arch = capability(self.device)
        shapes = [self.blocks[i].shape for i in indices for _ in range(2)]
        group = Group(precision, Rows(G=dtype), Rows(G=dtype))
        sizes = [k for i in indices for k in self.blocks[i].shape]
        side = square_tile(precision, sizes, self.device, epilogue=True)["BM"]
        self.groups.append(group)
        for index in indices:
            block, own = self.blocks[index], workspace(self.blocks[index])
            m, n = block.shape
            slots = -(-m // INNER[0]) * -(-n // INNER[1])
            scratch = (
                own.scratch("U", m, padded(n)), own.scratch("UT", n, padded(m)),
                own.scratch("WS", own.terms, m, padded(n)),
            )  # fmt: skip
            row = {
                "shape": (m, n), "own": own, "A": None, "params": (), "slot": self._take(slots), "slots": slots,
                "cols": n - (len(block.parts) > 1), "scratch": scratch, **self._common(index),
            }  # fmt: skip
            group.rows.add(x=self.fvs[index], **row)
            if self.precondition:
                group.again.add(x=own.out[:, :n], **row)
            group.members.append(block)
            self._add_factors(group, block, scratch, side)
        demanding = group.rows.general or min(group.rows.align, group.rows.align_x) == 1
        found = shape_class(shapes, precision, arch, processors(self.device), demanding)
        group.config = tile(found, precision, arch)._asdict()

    def _add_factors(self, group: Group, block: Block, scratch: tuple[Tensor, Tensor, Tensor], side: int) -> None:
        own, (m, n), (U, UT, WS) = workspace(block), block.shape, scratch
        step = block.aux_step if self._on_device(block) else None
        for number, (name, square, transposed) in enumerate(factor_rows(block)):
            k, term = (m if transposed else n), int(name[1:] or 1) - 1
            mp = padded(m)
            PW = own.XT[:, term * mp : (term + 1) * mp]
            more = {x: own.scratch(f"{x} {name}", k, padded(k)) for x in ("sym", "new", "grad")}
            group.factors.add(
                block.structure.fishleg_aux[name], square, transposed,
                moments=(block.exp_avg[name], block.exp_avg_sq[name]),
                operands=(WS[term], U) if transposed else (UT, PW),
                slot=self.square_slots, step=step, first=number == 0, **more,
            )  # fmt: skip
            group.biases.append(self._bias(block))
            self.square_slots += (-(-k // side)) ** 2


def _log2(beta: float) -> float:
    return math.log2(beta) if beta > 0 else -math.inf


_INNER = dict(zip(("ROWS", "COLS"), INNER, strict=True))


def _floats(values: Sequence[Sequence[float]], device: torch.device) -> Tensor:
    return upload(tuple(x for pair in values for x in pair), torch.float32, device)


def _products(plan: Plan, damping: float, rescale: bool) -> None:
    """w's products and all sums."""
    device, sums = plan.device, 2 * KIND.value
    for group in plan.groups:
        rows, shapes = group.rows.device(device), group.rows.shapes
        bm, bn = group.config["BM"], group.config["BN"]
        right = tiles([(k, n, m, t) for k, (m, n, terms) in enumerate(shapes) for t in range(terms)], bm, bn)
        left = tiles(
            [(k, m, n, KIND.value + t) for k, (m, n, terms) in enumerate(shapes) for t in range(terms)], bm, bn
        )
        dots = tiles([(k, m, n, sums) for k, (m, n, _) in enumerate(shapes)], *INNER, numbered=True)
        todo = (
            [(dots, False, False), ((), rescale, plan.precondition)] if rescale else [(dots, False, plan.precondition)]
        )
        for entries, scaled, first in todo:
            if not (rescale and entries is dots):
                entries = right + entries if first else right + left + entries
            entries, count = schedule(entries, device)
            launch(
                products_kernel, count, rows, entries, plan.dots, plan.dot_slots, damping, device=device,
                RESCALE=scaled, PRECONDITION=first, SOURCE="residual", PRECISION=group.precision,
                **_INNER, **group.rows.constants(), **group.config,
            )  # fmt: skip
        if not plan.precondition:
            continue
        entries, count = schedule(tiles([(k, m, n, 0) for k, (m, n, _) in enumerate(shapes)], bm, bn), device)
        launch(
            left_kernel, count, rows, plan.dots, entries, plan.dots, plan.dots, 0, device=device, SUMS="none",
            AFTER=False, SCALED=False, SQUARED=False, PRECISION=group.precision, **group.rows.constants(),
            **group.config,
        )  # fmt: skip
        entries, count = schedule(right + left, device)
        launch(
            products_kernel, count, group.again.device(device), entries, plan.dots, plan.dot_slots, damping,
            device=device, RESCALE=False, PRECONDITION=False, SOURCE="x", PRECISION=group.precision,
            **_INNER, **group.again.constants(), **group.config,
        )  # fmt: skip


def _diagonals(plan: Plan, damping: float) -> list[Tensor]:
    """The sums of Diagonal blocks. Returns the bias corrections that the next launch is to use."""
    used = []
    for rows, numbers, biases in plan.diagonals.values():
        entries = [(k, *rows.shapes[k][:2], number) for k, number in numbers]
        entries, count = schedule(tiles(entries, *ELEMENTWISE[:2], numbered=True), plan.device)
        used.append(torch.empty(len(rows), 2, dtype=torch.float32, device=plan.device))
        constants = rows.constants()
        constants.pop("ALIGN_X")
        launch(
            diagonal_sums_kernel, count, rows.device(plan.device), entries, _floats(biases, plan.device), used[-1],
            plan.dots, plan.dot_slots, plan.squares, damping, *map(_log2, plan.betas), device=plan.device,
            per_processor=4, PRECONDITION=plan.precondition, ROWS=ELEMENTWISE[0], COLS=ELEMENTWISE[1],
            num_warps=ELEMENTWISE[2], **constants,
        )  # fmt: skip
    return used


def _factors(plan: Plan, lr: Tensor, eps: float) -> None:
    """λ of Kron and SumKron, and their P and S."""
    device, (beta1, beta2) = plan.device, plan.betas
    for group in plan.groups:
        rows, sizes = group.factors.device(device), group.factors.sizes
        shapes = [(k, size, size, 0) for k, size in enumerate(sizes)]
        square = square_tile(group.precision, sizes, device)
        entries, count = schedule(tiles(shapes, square["BM"], square["BN"], half=True), device)
        launch(pair_kernel, count, rows, entries, device=device, PRECISION=group.precision, **square)
        square = square_tile(group.precision, sizes, device, epilogue=True)
        entries, count = schedule(tiles(shapes, square["BM"], square["BN"], numbered=True), device)
        launch(
            gradients_kernel, count, rows, entries, _floats(group.biases, device), plan.squares, lr, beta1, beta2, eps,
            *map(_log2, plan.betas), device=device, ALIGN=group.factors.align, PRECISION=group.precision, **square,
        )  # fmt: skip
    for group in plan.groups:  # once all gradients are known to be finite
        rows, sizes = group.factors.device(device), group.factors.sizes
        square = square_tile(group.precision, sizes, device)
        half = tiles([(k, size, size, 0) for k, size in enumerate(sizes)], square["BM"], square["BN"], half=True)
        entries, count = schedule(half + tiles([(k, s, s, 1) for k, s in enumerate(sizes)], *INNER), device)
        launch(
            commit_kernel, count, rows, entries, plan.dots, plan.dot_slots, plan.squares, plan.square_slots, plan.loss,
            plan.ok, beta1, beta2, device=device, PRECISION=group.precision, **_INNER, **square,
        )  # fmt: skip


def _diagonal_adam(plan: Plan, used: list[Tensor], lr: Tensor, eps: float, damping: float, rescale: bool) -> None:
    for biases, (rows, _, _) in zip(used, plan.diagonals.values(), strict=True):
        entries = tiles([(k, m, n, 0) for k, (m, n, _) in enumerate(rows.shapes)], *ELEMENTWISE[:2])
        entries, count = schedule(entries, plan.device)
        constants = rows.constants()
        constants.pop("ALIGN_X")
        launch(
            diagonal_adam_kernel, count, rows.device(plan.device), entries, biases, plan.dots, plan.dot_slots,
            plan.squares, plan.square_slots, plan.loss, plan.ok, lr, *plan.betas, eps, damping, device=plan.device,
            per_processor=4, RESCALE=rescale, PRECONDITION=plan.precondition, ROWS=ELEMENTWISE[0],
            COLS=ELEMENTWISE[1], num_warps=ELEMENTWISE[2], **constants,
        )  # fmt: skip


def _reference_dots(plan: Plan, damping: float) -> None:
    for index, slot in plan.slot_of.items():
        u, v, fv = [plan.us[index]], [plan.vs[index]], [plan.fvs[index]]
        plan.dots[0, slot] = steps.inner(u, v)
        plan.dots[1, slot] = steps.inner(v, fv) + damping * steps.inner(v, v)


def _reference_gradients(plan: Plan, damping: float, rescale: bool) -> dict[int, dict[str, Tensor]]:
    """∂λ of the blocks that the kernels do not cover, and their squares."""
    if not plan.slot_of:
        return {}
    uQu, vFv = plan.dots[0].sum(), plan.dots[1].sum()
    alpha = torch.where(vFv > 0, uQu / vFv, 1) if rescale else None
    found = {}
    for index, slot in plan.slot_of.items():
        block, fv = plan.blocks[index], plan.fvs[index]
        grads = steps.aux_gradients(block, plan.us[index], plan.vs[index], fv, damping, alpha, plan.precondition)
        found[index] = grads
        norms = [torch.linalg.vector_norm(g).to(plan.device, torch.float32) for g in grads.values()]
        plan.squares[slot] = torch.stack(norms).sum() if norms else 0.0
    return found


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
    """As ``reference.lambda_step``; nothing is decided on the host, which only waits where it counts the steps.

    Blocks that the kernels do not cover take their steps by the reference's functions, with the same 𝒜, α and decision.
    """
    kinds = [covered(*each) for each in zip(blocks, kinds_of(blocks), us, vs, strict=True)]
    if not any(kinds):
        return reference.lambda_step(
            blocks, us, vs, fvs, damping=damping, lr=lr, betas=betas, eps=eps, precondition=precondition,
            learn_scale=learn_scale, capturable=capturable,
        )  # fmt: skip
    refresh_all([b for b, k in zip(blocks, kinds, strict=True) if k == "kron"])
    plan, rescale = Plan(blocks, us, vs, fvs, kinds, betas, precondition, capturable), not learn_scale
    at = (
        lr.to(plan.device, torch.float32)
        if isinstance(lr, Tensor)
        else upload((float(lr),), torch.float32, plan.device)
    )
    used = _diagonals(plan, damping)
    _reference_dots(plan, damping)
    _products(plan, damping, rescale)
    others = _reference_gradients(plan, damping, rescale)
    _factors(plan, at, eps)
    _diagonal_adam(plan, used, at, eps, damping, rescale)
    for index, grads in others.items():
        steps.adam_step(blocks[index], grads, lr, betas, eps, plan.ok)
    for block, found in zip(blocks, kinds, strict=True):
        if found is None:
            continue
        if not plan._on_device(block):
            block.aux_step.add_(plan.ok.to(block.aux_step.device))
        state = [*block.exp_avg.values(), *block.exp_avg_sq.values()]
        torch.autograd.graph.increment_version([*block.structure.fishleg_aux.values(), *state])
        if found == "kron":
            adopt(block)
    return plan.loss, plan.ok
