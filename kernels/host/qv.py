"""Q u over all blocks: 2 launches for all of Kron, Kron(scale=True), SumKron and DiagKron, 2 more if there are any of
the last, 1 for all Diagonal blocks.

v is (m, n) with rows that begin at multiples of 16 elements. ``torch.ops.fishleg_fast.kron_qv`` is the same of tensors,
for torch.compile: P u S of a list of matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...algebra.low_rank import LowRank
from ...algebra.matrix import Matrix
from ...backends import reference
from ...model.block import Block
from ..device.diagonal import diagonal_product_kernel
from ..device.products import left_kernel, right_kernel
from .configurations import ELEMENTWISE, shape_class, tile
from .coverage import FACTORED, kinds_of
from .diagkron import append_core, core_launches
from .launch import Launch, capability, processors
from .plans import Plan, plan_of
from .refresh import refresh_stale
from .state import workspace_of
from .tables.block_rows import BlockRows, Gradient, pieces, weight_columns
from .tables.matrices import Given, Layouts, Scales
from .tables.step_table import Sources, StepTable, Told
from .tables.strides import padded
from .tables.uploads import schedule, tiles, upload
from .tables.workspace import ProductBuffers


class QvPlan(Plan):
    """The rows, schedules and launches of Q u. All v of a call are new, in one piece of memory."""

    def __init__(
        self,
        blocks: Sequence[Block],
        given: Given,
        scales: Scales,
        low_rank: Sequence[bool],
    ) -> None:
        super().__init__(blocks)
        self.kinds = [None if low else k for low, k in zip(low_rank, kinds_of(blocks), strict=True)]
        indices = [i for i, k in enumerate(self.kinds) if k]
        if not indices:
            return
        self.factored = [i for i in indices if self.kinds[i] in FACTORED]
        self.device = blocks[indices[0]].momentum.device
        self._layouts = Layouts(blocks, given)
        us = self._layouts.readable(given)
        self._sources = Sources(len(us) + len(scales) + 1)
        self.views: dict[int, tuple[tuple[int, int], tuple[int, int], int]] = {}  # each v's shape, strides and place
        self.entries = 0
        for i in indices:
            (m, n), row = blocks[i].shape, padded(blocks[i].shape[1])
            whole = self.kinds[i] == "diagonal"
            self.views[i] = (m, n), (n if whole else row, 1), self.entries
            self.entries += padded(m * n) if whole else m * row
        memory = torch.empty(self.entries, dtype=torch.float32, device=self.device)
        at = len(us) + len(scales)
        parts = {i: self._layouts.parts(i, blocks[i], given, us, self._sources) for i in indices}
        told = {i: scales.told(i, len(us), self._sources) for i in indices}
        outs = {i: self._sources.step(at, memory, memory.as_strided(*self.views[i])) for i in indices}
        groups: dict[tuple, list[int]] = {}
        for i in indices:
            diagonal = self.kinds[i] == "diagonal"
            precision = "" if diagonal else blocks[i].structure.precision
            groups.setdefault((diagonal, self._layouts.dtypes[i], precision), []).append(i)
        prepared = []
        for (diagonal, dtype, precision), mine in groups.items():
            rows, core = BlockRows(G=dtype), BlockRows()
            append = self._append_diagonal if diagonal else self._append_factored
            for i in mine:
                append(
                    rows, core, blocks[i], Gradient.of(parts[i], weight_columns(blocks[i]), told[i]), parts[i], outs[i]
                )
            scaled = any("A" in blocks[i].structure.fishleg_aux for i in mine)
            prepared.append((diagonal, rows, core, scaled, precision))
        self._table = self._sources.table(self.device)
        self.launches: list[Launch] = []
        for diagonal, rows, core, scaled, precision in prepared:
            table = rows.upload(self.device, self._table)
            if diagonal:
                self.launches.append(_diagonal_launch(rows, table, self.device))
            else:
                self.launches += _product_launches(rows, table, core, self._table, scaled, precision, self.device)

    def _append_factored(
        self, rows: BlockRows, core: BlockRows, block: Block, u: Gradient, parts: list[Told | None], out: Told
    ) -> None:
        if "B" in block.structure.fishleg_aux:
            append_core(core, block, self._sources)
        rows.append(
            block.shape, u, buffers=workspace_of(block).buffers(), out=out, A=block.structure.fishleg_aux.get("A")
        )

    def _append_diagonal(
        self, rows: BlockRows, core: BlockRows, block: Block, u: Gradient, parts: list[Told | None], out: Told
    ) -> None:
        d = block.structure.fishleg_aux["d"]
        for piece in pieces(block):
            rows.append(
                piece.shape, Gradient.of(parts[piece.parts], piece.cols, u.scale), A=d[piece.entries],
                v=self._sources.rows(out, piece.entries), vector=piece.vector,
            )  # fmt: skip

    def run(self, given: Given, scales: Scales) -> dict[int, Tensor]:
        """v of each block that is covered."""
        us, on_device = self._layouts.readable(given), scales.readable(self.device)
        memory = torch.empty(self.entries, dtype=torch.float32, device=self.device)
        self._table.tell(self._sources.addresses([t.data_ptr() for t in (*us, *on_device, memory)]))
        for launch in self.launches:
            launch()
        return {i: memory.as_strided(*view) for i, view in self.views.items()}


def qv(blocks: Sequence[Block], us: Sequence[Matrix]) -> list[Matrix]:
    """As the reference's, which computes it for low-rank u and for blocks that the kernels do not cover."""
    if not blocks:
        return []
    scales, given = Scales(us), Given(us, blocks, scaled=True)
    low_rank = [isinstance(u, LowRank) for u in us]
    facts = given.facts(), scales.facts(), low_rank
    plan = plan_of(blocks, "Q u", facts, lambda: QvPlan(blocks, given, scales, low_rank))
    if not any(plan.kinds):
        return reference.qv(blocks, us)
    if plan.needs_refresh():
        refresh_stale([blocks[i] for i in plan.factored])
    found = plan.run(given, scales)
    return [
        found[i] if k else reference.qv([b], [u])[0]
        for i, (b, u, k) in enumerate(zip(blocks, us, plan.kinds, strict=True))
    ]


def _product_launches(
    rows: BlockRows, table: Tensor, core: BlockRows, told: StepTable, scaled: bool, precision: str, device: torch.device
) -> list[Launch]:
    """Into each row's OUT; ``core``: of the DiagKron blocks among them."""
    shapes, arch = rows.shapes, capability(device)
    found = shape_class([s[:2] for s in shapes], precision, arch, processors(device), rows.general or scaled)
    config = tile(found, precision, arch)
    shared = {"device": device, "SCALED": scaled, "PRECISION": precision, **rows.constants(), **config._asdict()}
    none = upload((0.0,), torch.float32, device)  # stands for what is not read
    right = [(i, n, m, t) for i, (m, n, terms) in enumerate(shapes) for t in range(terms)]
    right_entries, right_count = schedule(tiles(right, config.BM, config.BN), device)
    left = [(i, m, n, 0) for i, (m, n, _) in enumerate(shapes)]
    left_entries, left_count = schedule(tiles(left, config.BM, config.BN), device)
    first = {"SOURCE": "g", "COUNT": False, "CHECK": False, **shared}
    second = {"SUMS": "none", "AFTER": False, "SQUARED": False, **shared}
    return [
        Launch(right_kernel, right_count, (table, right_entries, none, none), first),
        *core_launches(core, told, precision, config, device),
        Launch(left_kernel, left_count, (table, left_entries, none, none, 0, none, 0, none), second),
    ]


def _diagonal_launch(rows: BlockRows, table: Tensor, device: torch.device) -> Launch:
    shapes = [(i, m, n, 0) for i, (m, n, _) in enumerate(rows.shapes)]
    entries, count = schedule(tiles(shapes, ELEMENTWISE.ROWS, ELEMENTWISE.COLS), device)
    constants = {"device": device, "per_processor": 4, **ELEMENTWISE._asdict(), **rows.gradient_constants()}
    return Launch(diagonal_product_kernel, count, (table, entries), constants)


@torch.library.custom_op("fishleg_fast::kron_qv", mutates_args=())
def kron_qv(us: list[Tensor], Ps: list[Tensor], Ss: list[Tensor], precision: str) -> list[Tensor]:
    """P u S of each u (m, n), for P (m, m) and S (n, n) symmetric.

    P and S are copied with padding, which blocks' own P and S have already. Returns new tensors (m, n), float32.
    """
    device = us[0].device
    rows, outs, sources = BlockRows(), [], Sources(0)
    read: list[object] = []  # by the kernels
    for u, P, S in zip(us, Ps, Ss, strict=True):
        m, n = u.shape
        if P.shape != (m, m) or S.shape != (n, n):
            raise ValueError(f"P and S should be ({m}, {m}) and ({n}, {n}) but are: {tuple(P.shape)}, {tuple(S.shape)}")
        XT = torch.empty(n, padded(m), dtype=torch.float32, device=device)
        out = torch.empty(m, padded(n), dtype=torch.float32, device=device)
        buffers, u = ProductBuffers(1, _with_padding(S), _with_padding(P), XT, out), u.to(torch.float32)
        rows.append((m, n), Gradient(n, sources.fixed(u)), buffers=buffers, out=sources.fixed(out))
        read += [buffers, u]
        outs.append(out)
    table = sources.table(device)
    for launch in _product_launches(rows, rows.upload(device, table), BlockRows(), table, False, precision, device):
        launch()
    del read
    return [out[:, : u.shape[1]].contiguous() for out, u in zip(outs, us, strict=True)]


@kron_qv.register_fake
def _(us: list[Tensor], Ps: list[Tensor], Ss: list[Tensor], precision: str) -> list[Tensor]:
    return [torch.empty(u.shape, dtype=torch.float32, device=u.device) for u in us]


def _with_padding(square: Tensor) -> Tensor:
    k = square.shape[0]
    out = torch.zeros(k, padded(k), dtype=torch.float32, device=square.device)
    out[:, :k] = square
    return out
