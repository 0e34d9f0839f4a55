"""The plan of a λ step: rows of blocks and of their factors, and memory for sums, for a list of blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from ....backends.protocol import LambdaOptions
from ....model.block import Block
from ..configurations import BESIDE_PRODUCTS, elementwise_tiles, shape_class, tile
from ..coverage import counts_on_device, kinds_of
from ..launch import capability, processors
from ..plans import Plan
from ..refresh import square_tile
from ..state import workspace_of
from ..tables.block_rows import BlockRows, Gradient, Scalars, pieces, weight_columns
from ..tables.factor_rows import FactorRows, Learning, factors_of
from ..tables.matrices import Layouts
from ..tables.step_table import Sources, Told
from ..tables.strides import padded
from ..tables.workspace import LambdaBuffers
from .vectors import Vectors, is_readable, row_major

_address = Tensor.data_ptr


@dataclass
class Group:
    """Blocks of Kron's kind that share launches: u of one dtype, one precision."""

    precision: str
    rows: BlockRows
    preconditioned_rows: BlockRows  # the same with Q w in place of F v
    config: dict = field(default_factory=dict)  # of products
    factors: FactorRows = field(default_factory=FactorRows)
    start: int = 0  # number of its first factor's bias corrections
    counters: list[int] = field(default_factory=list)  # the block of each factor


@dataclass
class DiagonalGroup:
    """Diagonal blocks that share launches: u of one dtype."""

    rows: BlockRows
    numbers: list[tuple[int, int]] = field(default_factory=list)  # (row, its first tile's number in the block)
    start: int = 0  # number of its first row's bias corrections
    counters: list[int] = field(default_factory=list)  # the block of each row


class LambdaPlan(Plan):
    """A λ step's rows, sums and results; ``kinds`` has none where the kernels learn none of the blocks."""

    def __init__(self, blocks: Sequence[Block], vectors: Vectors, options: LambdaOptions) -> None:
        super().__init__(blocks, learning=True)
        self.kinds = [
            None if low or "A" in block.structure.fishleg_aux else kind
            for block, kind, low in zip(
                blocks, kinds_of(blocks), vectors.low_rank or [False] * len(blocks), strict=True
            )
        ]
        covered = [i for i, k in enumerate(self.kinds) if k]
        if not covered:
            return
        self.uncovered = [i for i, k in enumerate(self.kinds) if not k]
        self.factored = [i for i, k in enumerate(self.kinds) if k == "kron"]
        self.device = blocks[covered[0]].momentum.device
        self.precondition, capturable = options.precondition, options.capturable
        self.counted = frozenset(i for i in covered if counts_on_device(blocks[i].aux_step, blocks[i], capturable))
        self._host = [i for i in covered if i not in self.counted]
        self._counted_alike = len(self._host) == len(covered)
        self._layouts = Layouts(blocks, vectors.u)
        self._blocks = len(blocks)
        self._covered, self._selects = covered, len(covered) < len(blocks)
        self._copies = not all(map(is_readable, [*vectors.v, *vectors.fv]))
        us, scales, vs, fvs = self._read(vectors)
        self._sources = Sources(len(us) + len(scales) + len(vs) + len(fvs))
        self.dot_slots = self.square_slots = self._corrections = 0
        # Slots that sums and squares have in common come first: Diagonal's.
        self.diagonals: dict[torch.dtype, DiagonalGroup] = {}  # by dtype of u
        told = {i: self._layouts.parts(i, blocks[i], vectors.u, us, self._sources) for i in covered}
        at = {}  # scale, v and F v of each
        for k, i in enumerate(covered):
            v = self._sources.step(len(us) + len(scales) + k, vs[k])
            fv = self._sources.step(len(us) + len(scales) + len(vs) + k, fvs[k])
            at[i] = vectors.scales.told(i, len(us), self._sources), v, fv
        for index in covered:
            if self.kinds[index] == "diagonal":
                self._append_diagonal(blocks[index], index, told[index], *at[index])
        self.square_slots = self.dot_slots
        members: dict[tuple, list[int]] = {}
        for index in self.factored:
            key = self._layouts.dtypes[index], blocks[index].structure.precision
            members.setdefault(key, []).append(index)
        self.factor_count = 0
        self.groups = [self._group(blocks, key, found, told, at) for key, found in members.items()]
        self._everything: list[Group | DiagonalGroup] = [*self.diagonals.values(), *self.groups]
        for group in self._everything:
            group.start = self._corrections
            self._corrections += 2 * len(group.counters)
        self._table = self._sources.table(self.device, self._corrections + 1)
        self.numbers = self._table.numbers
        self._tables: dict[int, Tensor] = {}  # by id of the rows
        empty = lambda *shape: torch.empty(shape, dtype=torch.float32, device=self.device)
        zeros = lambda *shape, dtype=torch.float32: torch.zeros(shape, dtype=dtype, device=self.device)
        self.tensor_lr = empty(1)  # a copy of lr, if it is a tensor
        self.dots, self.squares = empty(2, self.dot_slots), empty(self.square_slots)
        self.dot_sums = zeros(2, len(blocks))  # of blocks
        self.square_sums = zeros(len(blocks) + self.factor_count)  # of blocks without factors, of factors
        self.arrived = zeros(len(blocks) + self.factor_count, dtype=torch.int32)

    @property
    def told_lr(self) -> Tensor:
        """Where the kernels find lr, if it is not a tensor."""
        return self.numbers[self._corrections :]

    def table(self, rows: BlockRows) -> Tensor:
        """Of a group, on the device."""
        if id(rows) not in self._tables:
            self._tables[id(rows)] = rows.upload(self.device, self._table)
        return self._tables[id(rows)]

    def _read(self, vectors: Vectors) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """u, scales, v and F v as kernels read them; copies where they do not. Of blocks that they learn."""
        vs, fvs = vectors.v, vectors.fv
        if self._selects:
            vs, fvs = [vs[i] for i in self._covered], [fvs[i] for i in self._covered]
        if self._copies:
            vs, fvs = [row_major(x) for x in vs], [row_major(x) for x in fvs]
        return self._layouts.readable(vectors.u), vectors.scales.readable(self.device), vs, fvs

    def tell(self, blocks: Sequence[Block], vectors: Vectors, options: LambdaOptions) -> object:
        """Tell the kernels of a step. What is returned they will read."""
        read = self._read(vectors)
        addresses = self._sources.addresses(list(map(_address, chain.from_iterable(read))))
        numbers = self._bias_corrections(blocks, options)
        if isinstance(options.lr, Tensor):
            self.tensor_lr.copy_(options.lr)
        else:
            numbers.append(float(options.lr))
        self._table.tell(addresses, numbers)
        return read

    def _bias_corrections(self, blocks: Sequence[Block], options: LambdaOptions) -> list[float]:
        """1 − β₁ᵗ and 1 − β₂ᵗ of each row, where the host counts."""
        counts = [blocks[i].aux_step.item() + 1 for i in self._host]
        beta1, beta2 = options.betas
        if self._counted_alike and counts.count(counts[0]) == len(counts):
            return [1 - beta1 ** counts[0], 1 - beta2 ** counts[0]] * (self._corrections // 2)
        of_block: dict[int, tuple[float, float]] = dict.fromkeys(self.counted, (1.0, 1.0))
        of_block |= {i: (1 - beta1**t, 1 - beta2**t) for i, t in zip(self._host, counts, strict=True)}
        return [x for group in self._everything for i in group.counters for x in of_block[i]]

    def corrections(self, group: Group | DiagonalGroup) -> Tensor:
        """Those of a group's rows."""
        return self.numbers[group.start :]

    def _take(self, count: int = 1) -> int:
        """The first of so many sums."""
        start, self.dot_slots = self.dot_slots, self.dot_slots + count
        return start

    def _counter(self, block: Block, index: int) -> Tensor | None:
        return block.aux_step if index in self.counted else None

    def _append_diagonal(
        self, block: Block, index: int, parts: list[Told | None], scale: Told | None, v: Told, fv: Told
    ) -> None:
        d, avg, avg_sq = block.structure.fishleg_aux["d"], block.exp_avg["d"], block.exp_avg_sq["d"]
        found, dtype = pieces(block), self._layouts.dtypes[index]
        group = self.diagonals.setdefault(dtype, DiagonalGroup(BlockRows(G=dtype)))
        counts = [elementwise_tiles(piece.shape) for piece in found]
        slot, slots, number = self._take(sum(counts)), sum(counts), 0
        for piece, count in zip(found, counts, strict=True):
            group.numbers.append((len(group.rows), number))
            group.counters.append(index)
            group.rows.append(
                piece.shape, Gradient.of(parts[piece.parts], piece.cols, scale), A=d[piece.entries],
                x=self._sources.rows(fv, piece.entries), v=self._sources.rows(v, piece.entries),
                moments=(avg[piece.entries], avg_sq[piece.entries]), vector=piece.vector,
                scalars=Scalars(self._counter(block, index), slot, slots, index, first=number == 0),
            )  # fmt: skip
            number += count

    def _group(self, blocks: Sequence[Block], key: tuple, indices: list[int], told: dict, at: dict) -> Group:
        dtype, precision = key
        group = Group(precision, BlockRows(G=dtype), BlockRows(G=dtype))
        sizes = [k for i in indices for k in blocks[i].shape]
        side = square_tile(precision, sizes, self.device, epilogue=True)["BM"]
        for index in indices:
            block, workspace, (scale, v, fv) = blocks[index], workspace_of(blocks[index]), at[index]
            m, n = block.shape
            slots = -(-m // BESIDE_PRODUCTS.ROWS) * -(-n // BESIDE_PRODUCTS.COLS)
            gradient = Gradient.of(told[index], weight_columns(block), scale)
            scalars = Scalars(self._counter(block, index), self._take(slots), slots, index)
            buffers, scratch = workspace.buffers(), workspace.lambda_buffers()
            out = self._sources.fixed(workspace.out)
            given = [(group.rows, fv)]
            if self.precondition:
                given.append((group.preconditioned_rows, self._sources.fixed(workspace.out[:, :n])))
            for rows, x in given:
                rows.append((m, n), gradient, buffers=buffers, out=out, x=x, v=v, scalars=scalars, scratch=scratch)
            self._append_factors(group, block, index, scratch, side)
        shapes = [blocks[i].shape for i in indices for _ in range(2)]
        demanding = group.rows.general or min(group.rows.align, group.rows.align_x) == 1
        arch = capability(self.device)
        found = shape_class(shapes, precision, arch, processors(self.device), demanding)
        group.config = tile(found, precision, arch)._asdict()
        return group

    def _append_factors(self, group: Group, block: Block, index: int, scratch: LambdaBuffers, side: int) -> None:
        """``side``: of the tiles that each write a sum of squares."""
        workspace, (m, n), (U, UT, WS) = workspace_of(block), block.shape, scratch
        for number, factor in enumerate(factors_of(block)):
            name, k, mp = factor.name, m if factor.transposed else n, padded(m)
            PW = workspace.XT[:, factor.term * mp : (factor.term + 1) * mp]
            left, right = (WS[factor.term], U) if factor.transposed else (UT, PW)
            sym, new, grad = (workspace.scratch(f"{x} {name}", k, padded(k)) for x in ("sym", "new", "grad"))
            slots = (-(-k // side)) ** 2
            learning = Learning(
                block.exp_avg[name], block.exp_avg_sq[name], left, right, sym, new, grad, self.square_slots, slots,
                self._blocks + self.factor_count, self._counter(block, index), first=number == 0,
            )  # fmt: skip
            group.factors.append(block.structure.fishleg_aux[name], factor.square, factor.transposed, learning)
            group.counters.append(index)
            self.square_slots += slots
            self.factor_count += 1


def log2_betas(options: LambdaOptions) -> tuple[float, float]:
    """log₂ of β₁ and β₂."""
    beta1, beta2 = (math.log2(beta) if beta > 0 else -math.inf for beta in options.betas)
    return beta1, beta2
