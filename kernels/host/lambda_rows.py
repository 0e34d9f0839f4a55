"""What the kernels of one λ step are told: rows of blocks and of their factors, and memory for sums; built at each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...algebra.low_rank import LowRank
from ...algebra.matrix import Matrix, dense
from ...backends import reference
from ...backends.protocol import LambdaOptions
from ...backends.reference import lambda_update
from ...model.block import Block
from .configurations import BESIDE_PRODUCTS, elementwise_tiles, shape_class, tile
from .coverage import counts_on_device
from .launch import capability, processors
from .refresh import square_tile
from .state import workspace_of
from .tables.block_rows import BlockMatrix, BlockRows, Gradient, Scalars, block_matrix, pieces, weight_columns
from .tables.factor_rows import FactorRows, Learning, factors_of
from .tables.strides import padded
from .tables.workspace import LambdaBuffers


def _row_major(t: Tensor) -> Tensor:
    """(m, n) with unit stride of columns: a copy where they are not next to each other."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def learned_kind(block: Block, found: str | None, u: Matrix, v: Matrix) -> str | None:
    """Its kind ``found``, but None for what λ's kernels leave to the reference."""
    low_rank = isinstance(u, LowRank) or isinstance(v, LowRank)
    return None if low_rank or "A" in block.structure.fishleg_aux else found


@dataclass
class Group:
    """Blocks of Kron's kind that share launches: u of one dtype, one precision."""

    precision: str
    rows: BlockRows
    preconditioned_rows: BlockRows  # the same with Q w in place of F v
    config: dict = field(default_factory=dict)  # of products
    factors: FactorRows = field(default_factory=FactorRows)
    corrections: list[tuple[float, float]] = field(default_factory=list)  # Adam's, of each factor


@dataclass
class DiagonalGroup:
    """Diagonal blocks that share launches: u of one dtype."""

    rows: BlockRows
    numbers: list[tuple[int, int]] = field(default_factory=list)  # (row, its first tile's number in the block)
    corrections: list[tuple[float, float]] = field(default_factory=list)  # Adam's, of each row


class LambdaStep:
    """One λ step's rows, sums and results."""

    def __init__(
        self,
        blocks: Sequence[Block],
        us: Sequence[Matrix],
        vs: Sequence[Matrix],
        fvs: Sequence[Matrix],
        kinds: Sequence[str | None],
        options: LambdaOptions,
    ) -> None:
        self.blocks, self.us, self.vs, self.kinds, self.options = blocks, us, vs, kinds, options
        self.device = next(b for b, k in zip(blocks, kinds, strict=True) if k).momentum.device
        self.fvs = [_row_major(dense(fv).to(torch.float32)) for fv in fvs]
        self.dot_slots = self.square_slots = 0
        directions = {i: block_matrix(blocks[i], us[i]) for i, found in enumerate(kinds) if found}
        # Slots that sums and squares have in common come first: Diagonal's, then the reference's.
        self.diagonals: dict[torch.dtype, DiagonalGroup] = {}  # by dtype of u
        for index, u in directions.items():
            if kinds[index] == "diagonal":
                self._append_diagonal(index, u)
        self.reference_slots = {index: self._take() for index, found in enumerate(kinds) if found is None}
        self.square_slots = self.dot_slots
        members: dict[tuple, dict[int, BlockMatrix]] = {}
        for index, u in directions.items():
            if kinds[index] == "kron":
                members.setdefault((u.dtype, blocks[index].structure.precision), {})[index] = u
        self.groups = [self._group(dtype, precision, us) for (dtype, precision), us in members.items()]
        empty = lambda *shape: torch.empty(shape, dtype=torch.float32, device=self.device)
        self.dots, self.squares, self.loss = empty(2, self.dot_slots), empty(self.square_slots), empty()
        self.ok = torch.empty((), dtype=torch.bool, device=self.device)

    @property
    def log2_betas(self) -> tuple[float, float]:
        """log₂ of β₁ and β₂."""
        beta1, beta2 = (math.log2(beta) if beta > 0 else -math.inf for beta in self.options.betas)
        return beta1, beta2

    def counts_on_device(self, block: Block) -> bool:
        """Whether the kernels count the block's steps."""
        return counts_on_device(block.aux_step, block, self.options.capturable)

    def _take(self, count: int = 1) -> int:
        """The first of so many sums."""
        start, self.dot_slots = self.dot_slots, self.dot_slots + count
        return start

    def _corrections(self, block: Block) -> tuple[float, float]:
        """1 − β₁ᵗ and 1 − β₂ᵗ, where the host counts."""
        if self.counts_on_device(block):
            return 1.0, 1.0
        t = block.aux_step.item() + 1
        return 1 - self.options.betas[0] ** t, 1 - self.options.betas[1] ** t

    def _counter(self, block: Block) -> Tensor | None:
        return block.aux_step if self.counts_on_device(block) else None

    def _append_diagonal(self, index: int, u: BlockMatrix) -> None:
        block, fv, v = self.blocks[index], self.fvs[index], _row_major(dense(self.vs[index]))
        d, avg, avg_sq = block.structure.fishleg_aux["d"], block.exp_avg["d"], block.exp_avg_sq["d"]
        found = pieces(block)
        group = self.diagonals.setdefault(u.dtype, DiagonalGroup(BlockRows(G=u.dtype)))
        counts = [elementwise_tiles(piece.shape) for piece in found]
        slot, slots, number = self._take(sum(counts)), sum(counts), 0
        for piece, count in zip(found, counts, strict=True):
            group.numbers.append((len(group.rows), number))
            group.corrections.append(self._corrections(block))
            group.rows.append(
                piece.shape, Gradient.of(u.parts[piece.parts], piece.cols, u.scale), A=d[piece.entries],
                x=fv[piece.entries], v=v[piece.entries], moments=(avg[piece.entries], avg_sq[piece.entries]),
                scalars=Scalars(self._counter(block), slot, slots, first=number == 0), vector=piece.vector,
            )  # fmt: skip
            number += count

    def _group(self, dtype: torch.dtype, precision: str, us: dict[int, BlockMatrix]) -> Group:
        group = Group(precision, BlockRows(G=dtype), BlockRows(G=dtype))
        sizes = [k for i in us for k in self.blocks[i].shape]
        side = square_tile(precision, sizes, self.device, epilogue=True)["BM"]
        for index, u in us.items():
            block, workspace = self.blocks[index], workspace_of(self.blocks[index])
            m, n = block.shape
            slots = -(-m // BESIDE_PRODUCTS.ROWS) * -(-n // BESIDE_PRODUCTS.COLS)
            gradient, v = Gradient.of(u.parts, weight_columns(block), u.scale), _row_major(dense(self.vs[index]))
            scalars = Scalars(self._counter(block), self._take(slots), slots)
            buffers, scratch = workspace.buffers(), workspace.lambda_buffers()
            given = [(group.rows, self.fvs[index])]
            if self.options.precondition:
                given.append((group.preconditioned_rows, workspace.out[:, :n]))
            for rows, x in given:
                rows.append((m, n), gradient, buffers=buffers, x=x, v=v, scalars=scalars, scratch=scratch)
            self._append_factors(group, block, scratch, side)
        shapes = [self.blocks[i].shape for i in us for _ in range(2)]
        demanding = group.rows.general or min(group.rows.align, group.rows.align_x) == 1
        arch = capability(self.device)
        found = shape_class(shapes, precision, arch, processors(self.device), demanding)
        group.config = tile(found, precision, arch)._asdict()
        return group

    def _append_factors(self, group: Group, block: Block, scratch: LambdaBuffers, side: int) -> None:
        """``side``: of the tiles that each write a sum of squares."""
        workspace, (m, n), (U, UT, WS) = workspace_of(block), block.shape, scratch
        for number, factor in enumerate(factors_of(block)):
            name, k, mp = factor.name, m if factor.transposed else n, padded(m)
            PW = workspace.XT[:, factor.term * mp : (factor.term + 1) * mp]
            left, right = (WS[factor.term], U) if factor.transposed else (UT, PW)
            sym, new, grad = (workspace.scratch(f"{x} {name}", k, padded(k)) for x in ("sym", "new", "grad"))
            learning = Learning(
                block.exp_avg[name], block.exp_avg_sq[name], left, right, sym, new, grad, self.square_slots,
                self._counter(block), first=number == 0,
            )  # fmt: skip
            group.factors.append(block.structure.fishleg_aux[name], factor.square, factor.transposed, learning)
            group.corrections.append(self._corrections(block))
            self.square_slots += (-(-k // side)) ** 2

    def sum_reference_blocks(self) -> None:
        """What blocks that the kernels do not cover contribute to uᵀv and vᵀ(F+γI)v."""
        for index, slot in self.reference_slots.items():
            u, v, fv = [self.us[index]], [self.vs[index]], [self.fvs[index]]
            self.dots[0, slot] = reference.inner(u, v)
            self.dots[1, slot] = reference.inner(v, fv) + self.options.damping * reference.inner(v, v)

    def reference_gradients(self) -> dict[int, dict[str, Tensor]]:
        """∂λ of those blocks, and their squares."""
        if not self.reference_slots:
            return {}
        uQu, vFv = self.dots[0].sum(), self.dots[1].sum()
        alpha = torch.where(vFv > 0, uQu / vFv, 1) if not self.options.learn_scale else None
        found = {}
        for index, slot in self.reference_slots.items():
            block, fv = self.blocks[index], self.fvs[index]
            grads = lambda_update.aux_gradients(block, self.us[index], self.vs[index], fv, alpha, self.options)
            found[index] = grads
            norms = [torch.linalg.vector_norm(g).to(self.device, torch.float32) for g in grads.values()]
            self.squares[slot] = torch.stack(norms).sum() if norms else 0.0
        return found
