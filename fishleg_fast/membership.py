"""Which blocks an optimizer has: those of its groups' parameters, as these come and go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from torch.optim import Optimizer

from . import checkpoint
from .model.assemble import attach, build_blocks, detach
from .model.block import Block
from .model.groups import GroupAssignment
from .options import Settings, check_membership
from .passes.taps.gradients import GradientTap
from .passes.taps.positions import PositionTap
from .passes.taps.statistics import StatisticsTap
from .sharded.model import ShardedModel
from .sharded.sharding import Sharding


class Membership:
    """``blocks``: those whose λ is on this rank. ``sharded``: all of the model's, where ranks share them out.

    ``roots``: (prefix of names, module) of what is trained. ``taps``: what sees the blocks' layers.
    """

    def __init__(
        self,
        roots: Sequence[tuple[str, nn.Module]],
        settings: Settings,
        sharding: Sharding | None,
        taps: Sequence[GradientTap | StatisticsTap],
        positions: PositionTap,
    ) -> None:
        self.roots, self.settings, self.sharding = roots, settings, sharding
        self.taps, self.positions = taps, positions
        self.groups = GroupAssignment(roots)
        self.blocks: list[Block] = []
        self.sharded: ShardedModel | None = None
        self._published = 0  # entries of the optimizer's state

    @property
    def layouts(self) -> list[Block]:
        """All blocks of the model, of which ``blocks`` are those whose λ is on this rank."""
        return self.blocks if self.sharded is None else self.sharded.layouts

    def unfollowed(self, optimizer: Optimizer) -> bool:
        """Whether parameters came, left or lost their state since the latest step."""
        return len(optimizer.state) < self._published or not self.groups.current(optimizer.param_groups)

    def left(self, every: bool) -> bool:
        """Whether the model has lost parameters: of those without a gradient, or of ``every`` one."""
        return self.groups.left(self._suspects(every))

    def _suspects(self, every: bool) -> Iterator[nn.Parameter]:
        return (p for block in self.blocks for p in block.params if (every or p.grad is None) and p.requires_grad)

    def follow(self, optimizer: Optimizer, settled: bool = True) -> None:
        """Have blocks for the groups' parameters: new ones for those that came, none for those that left. Groups that
        are not ``settled`` may get more parameters before the next step.

        ValueError where a group has a parameter that is not the model's, TypeError where one cannot be trained.
        """
        if self.sharding is not None:
            self._follow_sharded(optimizer, self.sharding)
            return
        gone, new = self.groups.changes(self.blocks, optimizer.param_groups, settled)
        check_membership(self.roots, new)
        anew = [b for b in checkpoint.forgotten(self.blocks, optimizer.state) if b not in gone]
        new += {id(p): p for b in anew for p in b.params if p.numel()}.values()
        gone += anew
        if gone:
            leaving = set(map(id, gone))
            self.blocks = [block for block in self.blocks if id(block) not in leaving]
            for tap in (*self.taps, self.positions):
                tap.unwatch(gone)
            for _, root in self.roots:
                detach(root, gone)
            self.positions.news = True
        self._take_up(new)
        self.groups.assign(self.blocks, optimizer.param_groups, settled)
        self.publish(optimizer)

    def _take_up(self, params: list[nn.Parameter]) -> None:
        """Blocks, λ and state for parameters that have none yet."""
        s = self.settings
        fresh = [
            block
            for prefix, root in self.roots
            for block in build_blocks(root, params, s.structure, s.max_factor_size, prefix)
        ]
        self._start(fresh)
        self.blocks += fresh
        for tap in (*self.taps, self.positions):
            tap.watch(fresh)
        for _, root in self.roots:
            attach(root, self.blocks)

    def _start(self, blocks: Sequence[Block]) -> None:
        s = self.settings
        for block in blocks:
            block.allocate(s.on_device, learned=s.learned_by_adam)
            if s.init == "sgd":
                block.structure.start_sgd(s.scale)

    def _follow_sharded(self, optimizer: Optimizer, sharding: Sharding) -> None:
        """Blocks for the groups' parameters, once. RuntimeError where those have changed since."""
        groups = optimizer.param_groups
        if self.sharded is None:
            self._make_sharded(optimizer, sharding)
        elif len(optimizer.state) < self._published:  # it was let go of
            self.positions.unwatch(self.layouts)
            self._make_sharded(optimizer, sharding)
        elif not self.groups.current(groups):
            now = {id(p) for group in groups for p in group["params"] if p.numel()}
            if now != {id(p) for b in self.layouts for p in b.params}:
                raise RuntimeError(
                    "parameters of a model that was given to fully_shard should stay in the optimizer, but some "
                    "came or left: make another"
                )
            self.groups.assign([*self.layouts, *self.blocks], groups)

    def _make_sharded(self, optimizer: Optimizer, sharding: Sharding) -> None:
        _, new = self.groups.changes([], optimizer.param_groups)
        check_membership(self.roots, new, may_be_sharded=True)
        s = self.settings
        self.sharded = ShardedModel.of(sharding, self.roots, new, s.structure, s.max_factor_size)
        self.blocks = self.sharded.blocks
        self._start(self.blocks)
        self.positions.watch(self.layouts)
        self.groups.assign([*self.layouts, *self.blocks], optimizer.param_groups)
        self.publish(optimizer)

    def publish(self, optimizer: Optimizer) -> None:
        """Let the optimizer's ``state`` show the blocks' tensors."""
        others = {} if self.sharded is None else self.sharded.counters()
        checkpoint.publish(self.blocks, optimizer.param_groups, optimizer.state, others)
        self._published = len(optimizer.state)
