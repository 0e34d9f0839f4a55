"""What the host does for a θ step: rows, hyperparameters and partial sums of all blocks, and its launches in order."""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..blocks import Block
from ..reference import steps
from ..reference.thin import Matrix, Split, dense
from .configurations import ELEMENTWISE, Tile, shape_class, tile
from .diagkron import Between, middle, prepared
from .launch import capability, processors
from .rows import DTYPES, FACTORED, Rows, hypers, pieces, scattered
from .table import keep, schedule, tiles, workspace


def counts_on_device(block: Block, capturable: bool) -> bool:
    """Whether the block's step counter is where its kernels can read and write it."""
    return block.step.device == block.momentum.device and (capturable or block.step.device.type == "cuda")


@dataclass
class Group:
    """Blocks that share launches: gradients of one dtype, parameters of one dtype, one precision."""

    precision: str
    scaled: bool  # whether any has an outer diagonal A
    rows: Rows
    config: Tile
    members: list[tuple[int, slice]] = field(default_factory=list)  # of each row: its block, and its parts of that
    kron: list[int] = field(default_factory=list)  # row numbers of the FACTORED kinds
    middles: Rows = field(default_factory=Rows)  # of DiagKron blocks
    ranges: list[tuple[int, int]] = field(default_factory=list)  # (first slot, slots) of each
    diagonal: list[tuple[int, int]] = field(default_factory=list)  # (row, its first tile's number in the block)
    made: dict = field(default_factory=dict)

    def constants(self) -> dict:
        return self.rows.constants()

    def once(self, name: str, make: Callable[[], object]) -> object:
        """What ``make`` returned at the first call of that name."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def table(self, device: torch.device) -> Tensor:
        """The rows on the device."""
        return self.once("table", lambda: self.rows.device(device))

    def right(self, device: torch.device) -> tuple[Tensor, int]:
        """(row, tile of n, tile of m, term)"""
        shapes = self.rows.shapes
        entries = lambda: [(k, shapes[k][1], shapes[k][0], term) for k in self.kron for term in range(shapes[k][2])]
        return self.once("right", lambda: schedule(tiles(entries(), self.config.BM, self.config.BN), device))

    def between(self, device: torch.device) -> Between | None:
        """DiagKron's products in between."""
        return self.once("between", lambda: prepared(self.middles, self.precision, self.config, device))

    def left(self, device: torch.device) -> tuple[Tensor, int]:
        """(row, tile of m, tile of n, its number)"""
        entries = lambda: [(k, *self.rows.shapes[k][:2], 0) for k in self.kron]
        sides = self.config.BM, self.config.BN
        return self.once("left", lambda: schedule(tiles(entries(), *sides, numbered=True), device))

    def sums(self, device: torch.device) -> tuple[Tensor, int]:
        """(row, tile of rows, tile of columns, its number) of Diagonal blocks."""
        entries = lambda: [(k, *self.rows.shapes[k][:2], number) for k, number in self.diagonal]
        return self.once("sums", lambda: schedule(tiles(entries(), *ELEMENTWISE[:2], numbered=True), device))

    def update(self, device: torch.device) -> tuple[Tensor, int]:
        """(row, tile of rows, tile of columns, unused)"""
        entries = lambda: [(k, m, n, 0) for k, (m, n, _) in enumerate(self.rows.shapes)]
        return self.once("update", lambda: schedule(tiles(entries(), *ELEMENTWISE[:2]), device))


_plans: weakref.WeakKeyDictionary[Block, OrderedDict[tuple, Plan]] = weakref.WeakKeyDictionary()
KEPT = 8  # plans of the same first block: gradients move between few places


def plan_of(blocks: Sequence[Block], gs: Sequence[Matrix], kinds: Callable[[], list[str | None]], *how: object) -> Plan:
    """The plan of a step, ready to run: that of an earlier one where everything is where it was."""
    places = [_places(b, g) for b, g in zip(blocks, gs, strict=True)]
    known = _plans.setdefault(blocks[0], OrderedDict())
    key = (how, tuple(places))
    plan = known.get(key)
    if plan is None or any(ref() is not b for ref, b in zip(plan.refs, blocks, strict=True)):
        plan = Plan(blocks, gs, kinds(), *how)
        if None not in places and not plan.copied:
            known[key] = plan
            if len(known) > KEPT:
                known.popitem(last=False)
    else:
        known.move_to_end(key)
    keep(plan)
    plan.begin(blocks, gs)
    return plan


def _places(block: Block, g: Matrix) -> tuple | None:
    """Where everything is that a block's rows point to; None where that cannot be told."""
    if isinstance(g, Split) and g.scale is not None:
        return None
    aux = block.structure.fishleg_aux
    own = [aux[name].data_ptr() for name in "ABd" if name in aux]
    return (
        id(block),
        id(block.structure),
        block.structure.precision,
        block.momentum.data_ptr(),
        block.step.data_ptr(),
        *own,
        (g.data_ptr(), g.stride(), g.dtype) if isinstance(g, Tensor) else None,
        *[None if t is None else (t.data_ptr(), t.stride(), t.dtype, t.layout) for t in block.grads],
        *[(part.param.data_ptr(), part.param.stride(), part.param.dtype) for part in block.parts],
        *[lr.data_ptr() if isinstance(lr := group["lr"], Tensor) else 0 for group in block.groups],
    )


class Plan:
    """One θ step. Between steps it holds no block and no gradient."""

    def __init__(
        self,
        blocks: Sequence[Block],
        gs: Sequence[Matrix],
        kinds: Sequence[str | None],
        momentum: str,
        times: int,
        normalize: str | None,
        capturable: bool,
    ) -> None:
        self.blocks, self.gs, self.kinds, self.momentum, self.times = blocks, gs, kinds, momentum, times
        self.after, self.normalize, self.capturable = momentum == "after", normalize, capturable
        self.refs = [weakref.ref(b) for b in blocks]
        self.device = next(b for b, k in zip(blocks, kinds, strict=True) if k).momentum.device
        self.slots = 0  # partial sums of all blocks together
        self.slot_of: dict[int, int] = {}  # of the reference's blocks
        self.groups: list[Group] = []
        self.copied = False  # whether rows point to copies of gradients
        self._group()
        self.copied |= any(group.rows.copied for group in self.groups)
        for index, k in enumerate(kinds):
            if k is None:
                self.slot_of[index] = self._take(1)
        self.partials = torch.empty(2, self.slots, dtype=torch.float32, device=self.device)
        self.corrections = torch.empty(len(blocks), dtype=torch.float32, device=self.device)

    def begin(self, blocks: Sequence[Block], gs: Sequence[Matrix]) -> None:
        """Take up a step of these blocks."""
        self.blocks, self.gs = blocks, gs
        self.directions: dict[int, tuple] = {}
        self.norms = torch.empty(len(blocks), dtype=torch.float32, device=self.device)
        self.ok = torch.empty((), dtype=torch.bool, device=self.device)

    def end(self) -> tuple[Tensor, Tensor]:
        """(norms, ok) of the step, which is let go of."""
        found = self.norms, self.ok
        self.blocks, self.gs, self.directions = (), (), {}
        del self.norms, self.ok
        for group in self.groups:
            group.rows.alive.clear()
        return found

    def hypers(self, group: Group) -> Tensor:
        """(rows, HYPERS) of a group as they are now."""
        values = [self._hyper(self.blocks[i], self.blocks[i].groups[parts]) for i, parts in group.members]
        return hypers(values, self.device)

    @property
    def fuses(self) -> bool:
        """Whether the update goes into the second product: it needs no norm, and there is nothing else to wait for."""
        return self.normalize is None and len(self.groups) == 1 and set(self.kinds) == {"kron"}

    def _take(self, count: int) -> int:
        start, self.slots = self.slots, self.slots + count
        return start

    def _hyper(self, block: Block, groups: Sequence[dict]) -> tuple[float, ...]:
        """``groups``: the weight's and the bias's."""
        beta, times, first, last = block.beta, self.times, groups[0], groups[-1]
        host = not counts_on_device(block, self.capturable)
        correction = 1 - beta ** (block.step.item() + times) if host else 1.0
        rates = [0.0 if self._on_device(g["lr"]) else float(g["lr"]) for g in (first, last)]
        m, n = block.shape
        log2beta = math.log2(beta) if beta > 0 else -math.inf
        return (
            beta**times, 1 - beta**times, 1 - beta, correction, log2beta, times,
            rates[0], first["weight_decay"], rates[1], last["weight_decay"], block.groups[0]["base_lr"] ** 2,
            steps.RMS * (m * n) ** 0.5,
        )  # fmt: skip

    def _on_device(self, lr: object) -> bool:
        return isinstance(lr, Tensor) and lr.device == self.device and lr.dtype == torch.float32

    def _group(self) -> None:
        grads, members = {}, {}
        for kind in (*FACTORED, "diagonal"):  # Diagonal blocks join a group of their dtypes
            for index, (block, g) in enumerate(zip(self.blocks, self.gs, strict=True)):
                if self.kinds[index] != kind:
                    continue
                g = dense(g) if isinstance(g, Split) and g.scale is not None else g
                found, _ = pieces(block, g)
                dtype = next((t.dtype for t in found if t is not None), torch.float32)
                dtype = dtype if dtype in DTYPES else torch.float32
                grads[index] = [None if t is None else t.to(dtype) for t in found]
                self.copied |= any(a is not b for a, b in zip(grads[index], found, strict=True))
                dtypes = (dtype, block.parts[0].param.dtype)
                key = (*dtypes, block.structure.precision)
                if kind == "diagonal":
                    key = next((k for k in members if k[:2] == dtypes), (*dtypes, "ieee"))
                members.setdefault(key, []).append(index)
        fuses = self.normalize is None and len(members) == 1 and set(self.kinds) == {"kron"}
        for (G, W, precision), indices in members.items():
            shapes = [self.blocks[i].shape for i in indices if self.kinds[i] in FACTORED]
            arch = capability(self.device)
            scaled = any("A" in self.blocks[i].structure.fishleg_aux for i in indices)
            tensors = [t for i in indices for t in (*grads[i], *self._moving(self.blocks[i])) if t is not None]
            demanding = fuses or scaled or self.after or self.normalize == "trust" or scattered(tensors)
            found = shape_class(shapes, precision, arch, processors(self.device), demanding)
            config = tile(found, precision, arch)
            group = Group(precision, scaled, Rows(G, W), config)
            self.groups.append(group)
            for i in indices:
                add = self._add_kron if self.kinds[i] in FACTORED else self._add_diagonal
                add(group, i, grads[i])

    def _common(self, block: Block, index: int) -> dict:
        step = block.step if counts_on_device(block, self.capturable) else None
        return {"index": index, "step": step, "v": None}

    def _add_kron(self, group: Group, index: int, grads: list[Tensor | None]) -> None:
        block, config = self.blocks[index], group.config
        m, n = block.shape
        slots = -(-m // config.BM) * -(-n // config.BN)
        own, views = workspace(block), self._moving(block)
        group.members.append((index, slice(None)))
        group.kron.append(len(group.rows))
        group.ranges.append((self._take(slots), slots))
        group.rows.add(
            shape=(m, n), own=own, A=block.structure.fishleg_aux.get("A"), x=block.momentum, grads=grads, params=views,
            cols=self._cols(block), rates=self._rates(block), slot=group.ranges[-1][0], slots=slots,
            **self._common(block, index),
        )  # fmt: skip
        if self.kinds[index] == "diagkron":
            group.middles.add_middle(middle(block), block.structure.fishleg_aux["B"])

    def _add_diagonal(self, group: Group, index: int, grads: list[Tensor | None]) -> None:
        """One row; one a part where they are below each other."""
        block, d = self.blocks[index], self.blocks[index].structure.fishleg_aux["d"]
        views, rates = self._moving(block), self._rates(block)
        if block.axis == 1:
            rows = [(block.shape, grads, views, self._cols(block), d, block.momentum, rates, slice(None), False)]
        else:
            rows, start = [], 0
            for k, (g, view, part, rate) in enumerate(zip(grads, views, block.parts, rates, strict=True)):
                count = part.of(part.param).numel()
                piece = slice(start, start + count)
                own = slice(k, k + 1)
                rows.append(((1, count), [g], [view], count, d[piece], block.momentum[piece], [rate], own, True))
                start += count
        counts = [-(-r[0][0] // ELEMENTWISE[0]) * -(-r[0][1] // ELEMENTWISE[1]) for r in rows]
        slot, slots, number = self._take(sum(counts)), sum(counts), 0
        for k, (shape, gs, params, cols, A, x, rate, which, vector) in enumerate(rows):
            group.members.append((index, which))
            group.diagonal.append((len(group.rows), number))
            group.rows.add(
                shape=shape, own=None, A=A, x=x, grads=gs, params=params, cols=cols, rates=rate, slot=slot, slots=slots,
                first=k == 0, vector=vector, **self._common(block, index),
            )  # fmt: skip
            number += counts[k]

    def _cols(self, block: Block) -> int:
        """Columns of the weight."""
        return block.shape[1] - (len(block.parts) > 1)

    def _moving(self, block: Block) -> list[Tensor | None]:
        """The parameters that have a gradient."""
        return [
            None if g is None else part.of(part.param.detach())
            for part, g in zip(block.parts, block.grads, strict=True)
        ]

    def _rates(self, block: Block) -> list[Tensor | None]:
        return [g["lr"] if self._on_device(g["lr"]) else None for g in block.groups]

    def add_reference(self) -> None:
        """What blocks that the kernels do not cover contribute to the sums."""
        for index, slot in self.slot_of.items():
            block, g = self.blocks[index], self.gs[index]
            x, nat = steps.direction(block, g, self.momentum, self.times)
            correction = 1 - block.beta ** (block.step.to(self.device) + self.times)
            norm = torch.linalg.vector_norm(nat).to(self.device, torch.float32)
            self.directions[index] = x, nat, correction, norm / correction
            self.partials[0, slot] = norm.square()
            self.partials[1, slot] = 0
            if self.normalize == "trust":
                length = steps.trust_length(block, g, nat, self.momentum, self.times).to(self.device)
                self.partials[1, slot] = length / (correction if self.after else correction**2)

    def finish_reference(self, kappa: float) -> None:
        """Move those blocks as the sums of all say."""
        scale = steps.trust_scale(self.partials[1].sum(), kappa) if self.normalize == "trust" else None
        for index, (x, nat, correction, norm) in self.directions.items():
            self.norms[index] = norm
            c = steps.rms_scales([self.gs[index]], [nat], norm[None])[0] if self.normalize == "rms" else scale
            c = 1 / correction if c is None else c / correction
            steps.move(self.blocks[index], x, nat, c, self.ok, True)
