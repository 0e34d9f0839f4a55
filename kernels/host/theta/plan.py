"""The plan of a θ step: what is prepared once for a list of blocks and run at every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....backends.protocol import ThetaOptions
from ....model.block import Block
from ..configurations import elementwise_tiles, shape_class, tile
from ..coverage import FACTORED, counts_on_device, kinds_of
from ..diagkron import append_core
from ..launch import capability, processors
from ..plans import Plan
from ..state import workspace_of
from ..tables.block_rows import BlockRows, Gradient, Parameters, Scalars, pieces, weight_columns
from ..tables.matrices import Given, Layouts
from ..tables.step_table import Sources, Told
from ..tables.strides import scattered
from ..tables.workspace import PolarBuffers
from .group import Group
from .hyperparameters import Hyperparameters, Member, rate_on_device
from .polar import PolarFactors, polar_buffers


class ThetaPlan(Plan):
    """A θ step's rows and memory for sums; ``kinds`` has none where the kernels cover none of the blocks."""

    def __init__(self, blocks: Sequence[Block], given: Given, options: ThetaOptions) -> None:
        super().__init__(blocks)
        self.options, self.after = options, not options.before
        self.kinds = kinds_of(blocks)
        covered = [i for i, k in enumerate(self.kinds) if k]
        if not covered:
            return
        self.device = blocks[covered[0]].momentum.device
        self.counted = frozenset(i for i in covered if counts_on_device(blocks[i].step, blocks[i], options.capturable))
        self.uncovered = [i for i, k in enumerate(self.kinds) if not k]
        self.factored = [i for i, k in enumerate(self.kinds) if k in FACTORED]
        self._slots = 0  # partial sums of all blocks together
        self.polar_factors: dict[str, PolarFactors] = {}  # by precision
        self.polar = self._polar_buffers(blocks)
        self._layouts = Layouts(blocks, given)
        tensors = self._layouts.readable(given)
        self._members: list[Member] = []  # of each row
        self._first_hyper = 1 + len(tensors)
        rows = sum(1 if self.kinds[i] in FACTORED else len(pieces(blocks[i])) for i in covered)
        self._sources = Sources(len(tensors) + rows)
        members = self._group_members(blocks)
        # Whether the update goes into the second product: it needs no norm, and there is nothing else to wait for.
        self.fuses = options.normalize is None and len(members) == 1 and set(self.kinds) == {"kron"}
        self.groups = [self._group(blocks, given, tensors, *each) for each in members.items()]
        self._hyper = Hyperparameters(blocks, self._members, options, self.counted, self.device)
        self.table = self._sources.table(self.device, self._hyper.most)
        self._offsets: list[int] = []  # of the latest step's records
        self._hypers: list[int] = []  # and their addresses
        empty = lambda *shape: torch.empty(shape, dtype=torch.float32, device=self.device)
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.int32, device=self.device)
        self.partials, self.corrections = empty(2, self._slots), empty(len(blocks))
        self.sums = torch.zeros(2, len(blocks), dtype=torch.float32, device=self.device)  # of blocks: ``left_kernel``
        self.arrived, self.broken = zeros(len(blocks) + 1), zeros(1)

    @property
    def slots(self) -> int:
        """Partial sums of all blocks together."""
        return self._slots

    def tell(self, blocks: Sequence[Block], given: Given) -> list[Tensor]:
        """Tell the kernels where this step's gradients are, and its hyperparameters. They read what is returned."""
        numbers, offsets = self._hyper.records(blocks, self.snapshot.steps)
        tensors = self._layouts.readable(given)
        found = given.addresses if tensors is given.tensors else [t.data_ptr() for t in tensors]
        if offsets is not self._offsets:
            start, self._offsets = self.table.numbers_start, offsets
            self._hypers = [start + offset for offset in offsets]
        self.table.tell(self._sources.addresses([*found, *self._hypers]), numbers)
        return tensors

    def count(self, ok: Tensor) -> None:
        """The host has counted a step, where ``ok``."""
        if ok.device.type == "cpu":
            self._hyper.count(self.snapshot.steps, bool(ok))

    def flattens(self, block: Block) -> bool:
        """Whether the block's nat gives way to its polar factor."""
        return self.options.normalize == "spectral" and block.flattened

    def _polar_buffers(self, blocks: Sequence[Block]) -> dict[int, PolarBuffers]:
        """Of each block whose polar factor our kernels compute, by its number."""
        found = {}
        for index, (block, kind) in enumerate(zip(blocks, self.kinds, strict=True)):
            if self.flattens(block) and block.momentum.device == self.device and block.dtype == torch.float32:
                precision = block.structure.precision
                found[index] = polar_buffers(block, kind, self.after)
                factors = self.polar_factors.setdefault(precision, PolarFactors(self.device, precision))
                factors.append(block.shape, found[index])
        return found

    def _take(self, count: int) -> int:
        """The first of so many partial sums."""
        start, self._slots = self._slots, self._slots + count
        return start

    def _group_members(self, blocks: Sequence[Block]) -> dict[tuple, list[int]]:
        """(dtypes, precision) of a group -> its blocks."""
        members: dict[tuple, list[int]] = {}
        for kind in (*FACTORED, "diagonal"):  # Diagonal blocks join a group of their dtypes
            for index, block in enumerate(blocks):
                if self.kinds[index] != kind:
                    continue
                dtypes = (self._layouts.dtypes[index], block.parts[0].param.dtype)
                key = (*dtypes, block.structure.precision)
                if kind == "diagonal":
                    key = next((k for k in members if k[:2] == dtypes), (*dtypes, "ieee"))
                members.setdefault(key, []).append(index)
        return members

    def _group(
        self, blocks: Sequence[Block], given: Given, tensors: list[Tensor], key: tuple, indices: list[int]
    ) -> Group:
        G, W, precision = key
        grads = {i: self._layouts.parts(i, blocks[i], given, tensors, self._sources) for i in indices}
        shapes = [blocks[i].shape for i in indices if self.kinds[i] in FACTORED]
        scaled = any("A" in blocks[i].structure.fishleg_aux for i in indices)
        read = [t.tensor for i in indices for t in grads[i] if t is not None]
        read += [t for i in indices for t in moving_parameters(blocks[i]) if t is not None]
        demanding = self.fuses or scaled or self.after or self.options.normalize == "trust" or scattered(read)
        arch = capability(self.device)
        found = shape_class(shapes, precision, arch, processors(self.device), demanding)
        group = Group(self.device, precision, scaled, BlockRows(G, W), tile(found, precision, arch))
        for i in indices:
            append = self._append_factored if self.kinds[i] in FACTORED else self._append_diagonal
            append(group, blocks[i], i, grads[i])
        return group

    def _scalars(self, block: Block, index: int, slot: int, slots: int, first: int, last: int, number: int) -> Scalars:
        """Of a block's row. ``first``, ``last``: its parts; ``number``: its first tile's."""
        hyper = self._first_hyper + len(self._members)
        self._members.append((index, first, last))
        m, n = block.shape
        entries = max(m, n) if self.flattens(block) else m * n
        step = block.step if index in self.counted else None
        return Scalars(step, slot, slots, index, number == 0, hyper, entries)

    def _append_factored(self, group: Group, block: Block, index: int, grads: list[Told | None]) -> None:
        config, (m, n), buffers = group.config, block.shape, workspace_of(block).buffers()
        slots = -(-m // config.BM) * -(-n // config.BN)
        slot = self._take(slots)
        group.factored.append(len(group.rows))
        group.rows.append(
            (m, n), Gradient.of(grads, weight_columns(block)), buffers=buffers, out=self._sources.fixed(buffers.out),
            A=block.structure.fishleg_aux.get("A"), x=self._sources.fixed(block.momentum),
            parameters=Parameters.of(self._parts(block)), polar=self._polar_of_row(group, index),
            scalars=self._scalars(block, index, slot, slots, 0, len(block.parts) - 1, 0),
        )  # fmt: skip
        if self.kinds[index] == "diagkron":
            append_core(group.core_rows, block, self._sources)

    def _append_diagonal(self, group: Group, block: Block, index: int, grads: list[Told | None]) -> None:
        d, parts, found = block.structure.fishleg_aux["d"], self._parts(block), pieces(block)
        counts = [elementwise_tiles(piece.shape) for piece in found]
        slot, slots, number = self._take(sum(counts)), sum(counts), 0
        for piece, count in zip(found, counts, strict=True):
            first, last, _ = piece.parts.indices(len(parts))
            group.diagonal.append((len(group.rows), number))
            group.rows.append(
                piece.shape, Gradient.of(grads[piece.parts], piece.cols), A=d[piece.entries],
                x=self._sources.fixed(block.momentum[piece.entries]), vector=piece.vector,
                parameters=Parameters.of(parts[piece.parts]), polar=self._polar_of_row(group, index),
                scalars=self._scalars(block, index, slot, slots, first, last - 1, number),
            )  # fmt: skip
            number += count

    def _polar_of_row(self, group: Group, index: int) -> tuple[Tensor, Tensor] | None:
        """Where the polar factor of the block whose row comes next in the group, and its transpose, will be."""
        if index not in self.polar:
            return None
        group.polar.append(len(group.rows))
        return self.polar[index].polar, self.polar[index].polar_t

    def _parts(self, block: Block) -> list[tuple[Tensor | None, Tensor | None]]:
        """Each part, None if it has no gradient, and its learning rate if that is on the device."""
        rates = [rate_on_device(group, self.device) for group in block.groups]
        return list(zip(moving_parameters(block), rates, strict=True))


def moving_parameters(block: Block) -> list[Tensor | None]:
    """Each part that has a gradient."""
    return [
        None if g is None else part.of(part.param.detach()) for part, g in zip(block.parts, block.grads, strict=True)
    ]
