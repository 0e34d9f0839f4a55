"""The blocks of a model whose parameters are sharded: all of them as layouts, and those that this rank owns.

A layout has the model's parameters as its parts, and a structure without memory. A block of this rank's own has λ and
all state, and stand-ins for its parameters: whole, and zero but while a step is taken, so that they hold its update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.matrix import Matrix, widest
from ..algebra.structures.base import Structure
from ..backends.protocol import Ops, ThetaOptions
from ..backends.reference.theta_update import trust_scale, trust_total
from ..model.assemble import StructureChoice, build_blocks
from ..model.block import Block, Part, advance, is_sharded
from .exchange import Directions, Exchange, Slot
from .owners import assign_owners
from .reduction import Expected, Reduction
from .sharding import Sharding
from .unit_views import UnitViews


class ShardedModel:
    """``layouts``: all blocks in the model's order; ``owners``: the number of each one's rank; ``mine``: this rank's
    own, by their numbers. ``structures``: of all, with memory where this rank owns the block.
    """

    def __init__(
        self,
        sharding: Sharding,
        layouts: Sequence[Block],
        owners: Sequence[int],
        structures: Sequence[Structure],
        likelihood: nn.Module | None,
    ) -> None:
        self.sharding, self.layouts = sharding, list(layouts)
        self.device = self.layouts[0].parts[0].param.device
        self.owners = list(owners)
        self._numbers = {id(b): k for k, b in enumerate(self.layouts)}
        self.mine: dict[int, Block] = {}
        for number, layout in enumerate(self.layouts):
            if self.owners[number] == sharding.index:
                self.mine[number] = _stand_in(layout, structures[number])
                self._numbers[id(self.mine[number])] = number
            layout.step = torch.zeros((), dtype=torch.float32, device="cpu")
        self.exchange = Exchange(sharding, self.layouts, self.owners)
        self.views = UnitViews(self.exchange)
        self._noise = set() if likelihood is None else set(map(id, likelihood.parameters()))

    @staticmethod
    def of(
        sharding: Sharding,
        roots: Sequence[tuple[str, nn.Module]],
        parameters: list[nn.Parameter],
        structure: StructureChoice | Mapping[str, StructureChoice],
        max_factor_size: int | str | None,
    ) -> ShardedModel:
        """Of the parameters of ``roots``, (prefix of names, module) each."""

        def build(device: Callable[[int], torch.device | None]) -> list[Block]:
            found: list[Block] = []
            for prefix, root in roots:
                here = partial(_from, device, len(found))
                found += build_blocks(root, parameters, structure, max_factor_size, prefix, here)
            return found

        layouts = build(lambda k: torch.device("meta"))
        owners = assign_owners(layouts, sharding.count)
        made = build(lambda k: None if owners[k] == sharding.index else torch.device("meta"))
        likelihood = [root for prefix, root in roots if prefix]
        return ShardedModel(
            sharding, layouts, owners, [b.structure for b in made], likelihood[0] if likelihood else None
        )

    @property
    def blocks(self) -> list[Block]:
        """Those that this rank owns."""
        return list(self.mine.values())

    def number(self, block: Block) -> int:
        """Of a layout, or of a block that this rank owns."""
        return self._numbers[id(block)]

    def reduction(self, take: Callable[[Slot, Tensor], None]) -> Reduction:
        """Of tensors of the parts' shapes."""
        parts = [(b, k, part) for b, block in enumerate(self.layouts) for k, part in enumerate(block.parts)]
        expected = [Expected(b, (b, k), part.shape, self.layouts[b].dtype) for b, k, part in parts]
        return Reduction(self.sharding, self.owners, take, expected)

    def noise_slots(self, numbers: set[int] | None = None) -> list[tuple[Slot, nn.Parameter]]:
        """The parts that are parameters of the likelihood, of those blocks or of all."""
        return [
            ((b, k), part.param)
            for b, block in enumerate(self.layouts)
            for k, part in enumerate(block.parts)
            if id(part.param) in self._noise and (numbers is None or b in numbers)
        ]

    def gather(self) -> list[Block]:
        """The blocks of this rank that have a gradient in this step, which they are given; all ranks call it."""
        grads: dict[Slot, Tensor] = {}
        for b, layout in enumerate(self.layouts):
            for k, part in enumerate(layout.parts):
                g = part.param.grad
                if g is not None and not is_sharded(g) and g.layout is not torch.strided:
                    g = g.to_dense()
                if g is not None:
                    grads[b, k] = -g if layout.groups[k]["maximize"] else g
        self._stepped = sorted(grads)
        found = self.exchange.gather(grads) if grads else {}
        for number, block in self.mine.items():
            block.grads = [found.get((number, k)) for k in range(len(block.parts))]
        return [b for b in self.mine.values() if any(g is not None for g in b.grads)]

    def local_norm(self) -> Tensor:
        """‖g‖ of what every rank has whole, as it is on this one: to be the same on all."""
        grads = [p.grad for b in self.layouts for p in b.params if p.grad is not None and not is_sharded(p)]
        dense = [g if g.layout is torch.strided else g.to_dense() for g in grads]
        norms = [torch.linalg.vector_norm(g).to(widest(self.device)) for g in dense]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=self.device)

    def counters(self) -> dict[Tensor, Tensor]:
        """How often the block of each parameter was stepped, of those that are elsewhere."""
        away = [b for k, b in enumerate(self.layouts) if k not in self.mine]
        return {p: b.step for b in away for p in b.params}

    def load_counters(self, saved: Mapping[int, Tensor]) -> None:
        """Take up what ``counters`` gave, on this rank or others: by the parameters' ids."""
        for layout in self.layouts:
            for p in layout.params:
                if id(p) in saved:
                    layout.step.copy_(saved[id(p)])

    def total(self, here: Tensor) -> Tensor:
        """Σ over the owners of blocks."""
        return self.sharding.over_owners(here.to(self.device, widest(self.device)))

    def everywhere(self, ok: Tensor) -> Tensor:
        """Whether it is so on all ranks."""
        return self.total((~ok).to(torch.float32)) == 0

    def others(self) -> list[nn.Parameter]:
        """The parameters of which fully_shard does not average the gradients, as every rank has them whole."""
        if not self.sharding.units:
            return []
        return list({id(p): p for b in self.layouts for p in b.params if not is_sharded(p)}.values())

    def step(
        self,
        ops: Ops,
        blocks: Sequence[Block],
        gs: Sequence[Matrix],
        theta: ThetaOptions,
        factor: Callable[[Directions], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``ops`` step the stand-ins of ``blocks``, and all ranks the parameters by that, where it can everywhere.

        ``factor``: of how far that moves parameters, what to multiply it by.
        """
        norms, ok = torch.zeros(0, device=self.device), torch.ones((), dtype=torch.bool, device=self.device)
        trust = self._trust(blocks, gs, theta) if theta.normalize == "trust" else None
        if blocks:
            norms, ok = ops.theta_step(blocks, gs, theta if trust is None else replace(theta, normalize=None))
        if trust is not None and blocks:
            torch._foreach_mul_([part.param.detach() for b in blocks for part in b.parts], trust)
        ok = self.everywhere(ok)
        if bool(ok):
            moves = self._moves()
            self._apply(moves, None if factor is None else factor(moves).to(self.device))
        stand_ins: list[Tensor] = [part.param.detach() for b in self.mine.values() for part in b.parts]
        if stand_ins:
            torch._foreach_zero_(stand_ins)
        return norms, ok

    def _moves(self) -> Directions:
        """What this step made of the stand-ins, and weight decay."""
        own = {(b, k): part.param.detach() for b, block in self.mine.items() for k, part in enumerate(block.parts)}
        groups = {(b, k): self.layouts[b].groups[k] for b, k in self._stepped}
        decay = {slot: group["lr"] * group["weight_decay"] for slot, group in groups.items() if group["weight_decay"]}
        return Directions(self.exchange, own, decay, keep=not self.sharding.units)

    def _trust(self, blocks: Sequence[Block], gs: Sequence[Matrix], theta: ThetaOptions) -> Tensor:
        """c of the blocks of all ranks, which an op does not know: it takes a product with Q of its own."""
        here = trust_total(blocks, gs, theta) if blocks else torch.zeros((), device=self.device)
        return trust_scale(self.total(here), theta.kappa)

    @torch.no_grad()
    def _apply(self, moves: Directions, factor: Tensor | None) -> None:
        """Move the parameters, by ``factor`` of it where there is one."""
        for (b, k), update in moves.pieces(self._stepped):
            part = self.layouts[b].parts[k]
            local = self.sharding.local(part, part.param)
            move = moves.along((b, k), local, update)
            local.copy_(local.to(update.dtype) + (move if factor is None else factor * move))
        advance([self.layouts[b].step for b in sorted({b for b, _ in self._stepped})])


def _from(device: Callable[[int], torch.device | None], first: int, number: int) -> torch.device | None:
    return device(first + number)


def check_settings(settings: Any) -> None:
    """ValueError where one does not go with blocks that ranks share out between them."""
    wrong = {
        "anchor_from": (settings.anchor_from, "'drawn'", settings.anchor_from != "drawn"),
        "capturable": (settings.capturable, "False", settings.capturable),
        "fisher": (
            settings.fisher,
            "'ggn', with a likelihood, or update_aux_every=0",
            settings.fisher != "ggn" and settings.learned_by_adam,
        ),
    }
    for name, (value, right, bad) in wrong.items():
        if bad:
            raise ValueError(f"{name} should be {right} with fully_shard or shard_state=True, but is: {value!r}")


def _stand_in(layout: Block, structure: Structure) -> Block:
    parts = []
    for part in layout.parts:
        zeros = torch.zeros(part.shape, dtype=layout.dtype, device=part.param.device)
        parts.append(Part(nn.Parameter(zeros, requires_grad=part.param.requires_grad)))
    block = Block(layout.name, parts, layout.axis, structure, layout.key, layout.layer)
    block.repeated, block.sharded = layout.repeated, list(layout.params)
    return block
