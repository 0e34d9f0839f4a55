"""The plan of a θ step: what is prepared once for a list of blocks and run at every step."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ....algebra.matrix import Matrix, dense
from ....backends.protocol import ThetaOptions
from ....backends.reference import theta_update
from ....model.block import Block
from ....model.gradients import GradientInPlace
from ...device.row_layout import H
from ..configurations import elementwise_tiles, shape_class, tile
from ..coverage import FACTORED, counts_on_device
from ..diagkron import append_core
from ..launch import capability, processors
from ..state import TritonState, workspace_of
from ..tables.block_rows import (
    BlockMatrix,
    BlockRows,
    Gradient,
    Parameters,
    Scalars,
    block_matrix,
    pieces,
    weight_columns,
)
from ..tables.strides import scattered
from ..tables.uploads import keep, stream_of, upload_rows
from ..tables.workspace import PolarBuffers
from .group import Group
from .polar import PolarFactors, polar_buffers

KEPT = 8  # plans of the same first block: gradients move between few places


def plan_of(
    blocks: Sequence[Block], gs: Sequence[Matrix], kinds: Callable[[], list[str | None]], options: ThetaOptions
) -> ThetaPlan:
    """The plan of a step, ready to run: that of an earlier one where everything is where it was."""
    places = [_places(b, g) for b, g in zip(blocks, gs, strict=True)]
    known = blocks[0].kept(TritonState).theta_plans
    key = (options, stream_of(blocks[0].momentum.device), tuple(places))
    plan: ThetaPlan | None = known.get(key)
    if plan is None or any(ref() is not b for ref, b in zip(plan.refs, blocks, strict=True)):
        plan = ThetaPlan(blocks, gs, kinds(), options)
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
    if isinstance(g, GradientInPlace) and g.scale is not None:
        return None
    aux = block.structure.fishleg_aux
    diagonals = [aux[name].data_ptr() for name in "ABd" if name in aux]
    return (
        id(block),
        id(block.structure),
        block.spectral,
        block.structure.precision,
        block.momentum.data_ptr(),
        block.step.data_ptr(),
        *diagonals,
        (g.data_ptr(), g.stride(), g.dtype) if isinstance(g, Tensor) else None,
        *[None if t is None else (t.data_ptr(), t.stride(), t.dtype, t.layout) for t in block.grads],
        *[(part.param.data_ptr(), part.param.stride(), part.param.dtype) for part in block.parts],
        *[lr.data_ptr() if isinstance(lr := group["lr"], Tensor) else 0 for group in block.groups],
    )


def moving_parameters(block: Block) -> list[Tensor | None]:
    """Each part that has a gradient."""
    return [
        None if g is None else part.of(part.param.detach()) for part, g in zip(block.parts, block.grads, strict=True)
    ]


class ThetaPlan:
    """A θ step's rows, schedules and memory for sums. Between steps it holds no block and no gradient."""

    def __init__(
        self,
        blocks: Sequence[Block],
        gs: Sequence[Matrix],
        kinds: Sequence[str | None],
        options: ThetaOptions,
    ) -> None:
        self.blocks, self.gs, self.kinds = blocks, gs, kinds
        self.options, self.after = options, not options.before
        self.refs = [weakref.ref(b) for b in blocks]
        self.device = next(b for b, k in zip(blocks, kinds, strict=True) if k).momentum.device
        self.slots = 0  # partial sums of all blocks together
        self.polar_factors: dict[str, PolarFactors] = {}  # by precision
        self.polar = self._polar_buffers()
        gradients, members = self._gradients()
        # Whether the update goes into the second product: it needs no norm, and there is nothing else to wait for.
        self.fuses = self.options.normalize is None and len(members) == 1 and set(kinds) == {"kron"}
        self.groups = [self._group(key, indices, gradients) for key, indices in members.items()]
        # Whether rows point to copies of gradients.
        self.copied = any(g.copied for g in gradients.values()) or any(group.rows.copied for group in self.groups)
        self.reference_slots = {index: self._take(1) for index, k in enumerate(kinds) if k is None}
        self.partials = torch.empty(2, self.slots, dtype=torch.float32, device=self.device)
        self.corrections = torch.empty(len(blocks), dtype=torch.float32, device=self.device)

    def begin(self, blocks: Sequence[Block], gs: Sequence[Matrix]) -> None:
        """Take up a step of these blocks."""
        self.blocks, self.gs = blocks, gs
        self.directions: dict[int, tuple] = {}  # of the blocks that the reference's functions step
        self.norms = torch.empty(len(blocks), dtype=torch.float32, device=self.device)
        self.ok = torch.empty((), dtype=torch.bool, device=self.device)

    def end(self) -> tuple[Tensor, Tensor]:
        """(norms, ok) of the step, which is let go of."""
        found = self.norms, self.ok
        self.blocks, self.gs, self.directions = (), (), {}
        del self.norms, self.ok
        for group in self.groups:
            group.rows.keep_alive.clear()
        return found

    def hyperparameters(self, group: Group) -> Tensor:
        """Of a group's rows, as they are now."""
        values = [self._hyper_row(self.blocks[i], self.blocks[i].groups[parts]) for i, parts in group.members]
        return upload_rows(values, torch.float32, self.device)

    def _hyper_row(self, block: Block, groups: Sequence[dict]) -> tuple[float, ...]:
        """``groups``: the weight's and the bias's."""
        beta, times, first, last = block.beta, self.options.averages, groups[0], groups[-1]
        host = not counts_on_device(block.step, block, self.options.capturable)
        lr, bias_lr = [0.0 if self._on_device(g["lr"]) else float(g["lr"]) for g in (first, last)]
        m, n = block.shape
        entries = max(m, n) if self._flattens(block) else m * n
        return H.pack(
            KEEP=beta**times, TAKE=1 - beta**times, RATE=1 - beta,
            CORRECTION=1 - beta ** (block.step.item() + times) if host else 1.0,
            LOG2_BETA=math.log2(beta) if beta > 0 else -math.inf, TIMES=times,
            LR=lr, DECAY=first["weight_decay"], BIAS_LR=bias_lr, BIAS_DECAY=last["weight_decay"],
            BASE_LR_SQUARED=block.groups[0]["base_lr"] ** 2, LENGTH_OF_STEP=theta_update.RMS * entries**0.5,
        )  # fmt: skip

    def _flattens(self, block: Block) -> bool:
        """Whether the block's nat gives way to its polar factor."""
        return self.options.normalize == "spectral" and block.flattened

    def _polar_buffers(self) -> dict[int, PolarBuffers]:
        """Of each block whose polar factor our kernels compute, by its number."""
        found = {}
        for index, (block, kind) in enumerate(zip(self.blocks, self.kinds, strict=True)):
            if self._flattens(block) and block.momentum.device == self.device and block.dtype == torch.float32:
                precision = block.structure.precision
                found[index] = polar_buffers(block, kind, self.after)
                factors = self.polar_factors.setdefault(precision, PolarFactors(self.device, precision))
                factors.append(block.shape, found[index])
        return found

    def _take(self, count: int) -> int:
        """The first of so many partial sums."""
        start, self.slots = self.slots, self.slots + count
        return start

    def _on_device(self, lr: object) -> bool:
        return isinstance(lr, Tensor) and lr.device == self.device and lr.dtype == torch.float32

    def _gradients(self) -> tuple[dict[int, BlockMatrix], dict[tuple, list[int]]]:
        """Of each block that the kernels cover, by its number; and (dtypes, precision) of a group -> its blocks."""
        gradients: dict[int, BlockMatrix] = {}
        members: dict[tuple, list[int]] = {}
        for kind in (*FACTORED, "diagonal"):  # Diagonal blocks join a group of their dtypes
            for index, (block, g) in enumerate(zip(self.blocks, self.gs, strict=True)):
                if self.kinds[index] != kind:
                    continue
                g = dense(g) if isinstance(g, GradientInPlace) and g.scale is not None else g
                gradients[index] = block_matrix(block, g)
                dtypes = (gradients[index].dtype, block.parts[0].param.dtype)
                key = (*dtypes, block.structure.precision)
                if kind == "diagonal":
                    key = next((k for k in members if k[:2] == dtypes), (*dtypes, "ieee"))
                members.setdefault(key, []).append(index)
        return gradients, members

    def _group(self, key: tuple, indices: list[int], gradients: dict[int, BlockMatrix]) -> Group:
        G, W, precision = key
        shapes = [self.blocks[i].shape for i in indices if self.kinds[i] in FACTORED]
        arch = capability(self.device)
        scaled = any("A" in self.blocks[i].structure.fishleg_aux for i in indices)
        parameters = [t for i in indices for t in moving_parameters(self.blocks[i])]
        tensors = [t for i in indices for t in gradients[i].parts] + parameters
        demanding = self.fuses or scaled or self.after or self.options.normalize == "trust"
        demanding = demanding or scattered([t for t in tensors if t is not None])
        found = shape_class(shapes, precision, arch, processors(self.device), demanding)
        group = Group(self.device, precision, scaled, BlockRows(G, W), tile(found, precision, arch))
        for i in indices:
            append = self._append_factored if self.kinds[i] in FACTORED else self._append_diagonal
            append(group, i, gradients[i].parts)
        return group

    def _append_factored(self, group: Group, index: int, grads: list[Tensor | None]) -> None:
        block, config = self.blocks[index], group.config
        m, n = block.shape
        slots = -(-m // config.BM) * -(-n // config.BN)
        slot = self._take(slots)
        group.members.append((index, slice(None)))
        group.factored.append(len(group.rows))
        group.slots.append((slot, slots))
        polar = self._polar_of_row(group, index)
        group.rows.append(
            (m, n), Gradient.of(grads, weight_columns(block)), buffers=workspace_of(block).buffers(),
            A=block.structure.fishleg_aux.get("A"), x=block.momentum, parameters=Parameters.of(self._parts(block)),
            scalars=Scalars(self._counter(block), slot, slots, index), polar=polar,
        )  # fmt: skip
        if self.kinds[index] == "diagkron":
            append_core(group.core_rows, block)

    def _append_diagonal(self, group: Group, index: int, grads: list[Tensor | None]) -> None:
        block, d = self.blocks[index], self.blocks[index].structure.fishleg_aux["d"]
        parts, found = self._parts(block), pieces(block)
        counts = [elementwise_tiles(piece.shape) for piece in found]
        slot, slots, number = self._take(sum(counts)), sum(counts), 0
        for piece, count in zip(found, counts, strict=True):
            group.members.append((index, piece.parts))
            group.diagonal.append((len(group.rows), number))
            polar = self._polar_of_row(group, index)
            group.rows.append(
                piece.shape, Gradient.of(grads[piece.parts], piece.cols), A=d[piece.entries],
                x=block.momentum[piece.entries], parameters=Parameters.of(parts[piece.parts]), vector=piece.vector,
                scalars=Scalars(self._counter(block), slot, slots, index, first=number == 0), polar=polar,
            )  # fmt: skip
            number += count

    def _polar_of_row(self, group: Group, index: int) -> tuple[Tensor, Tensor] | None:
        """Where the polar factor of the block whose row comes next in the group, and its transpose, will be."""
        if index not in self.polar:
            return None
        group.polar.append(len(group.rows))
        return self.polar[index].polar, self.polar[index].polar_t

    def _counter(self, block: Block) -> Tensor | None:
        return block.step if counts_on_device(block.step, block, self.options.capturable) else None

    def _parts(self, block: Block) -> list[tuple[Tensor | None, Tensor | None]]:
        """Each part, None if it has no gradient, and its learning rate if that is on the device."""
        rates = [group["lr"] if self._on_device(group["lr"]) else None for group in block.groups]
        return list(zip(moving_parameters(block), rates, strict=True))

    def sum_reference_blocks(self) -> None:
        """What blocks that the kernels do not cover contribute to the sums."""
        for index, slot in self.reference_slots.items():
            block, g = self.blocks[index], self.gs[index]
            x, nat = theta_update.direction(block, g, self.options)
            correction = 1 - block.beta ** (block.step.to(self.device) + self.options.averages)
            norm = torch.linalg.vector_norm(nat).to(self.device, torch.float32)
            self.directions[index] = x, nat, correction, norm / correction
            if index in self.polar:
                (m, n), unit = block.shape, nat / torch.where(norm > 0, norm, 1)
                self.polar[index].polar.zero_()[:, :n].copy_(unit)
                self.polar[index].polar_t.zero_()[:, :m].copy_(unit.T)
            self.partials[0, slot] = norm.square()
            self.partials[1, slot] = 0
            if self.options.normalize == "trust":
                length = theta_update.trust_length(block, g, nat, self.options).to(self.device)
                self.partials[1, slot] = length / (correction if self.after else correction**2)

    def move_reference_blocks(self) -> None:
        """Move those blocks as the sums of all say."""
        rule = self.options.normalize
        scale = theta_update.trust_scale(self.partials[1].sum(), self.options.kappa) if rule == "trust" else None
        for index, (x, nat, correction, norm) in self.directions.items():
            self.norms[index] = norm
            block, c = self.blocks[index], scale
            if rule in ("rms", "spectral"):
                flat = [self._flattens(block)]
                c = theta_update.spectral_scales(flat, [self.gs[index]], [nat], norm[None], correction[None])[0]
                if index in self.polar:
                    nat = self.polar[index].polar[:, : block.shape[1]]
                else:
                    (nat,) = theta_update.flattened(flat, [nat])
            c = 1 / correction if c is None else c / correction
            theta_update.move(block, x, nat, c, self.ok, True)
