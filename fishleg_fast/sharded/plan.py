"""What training a model on several ranks would take, by counts: memory of each rank, and bytes that it sends in a step.

Blocks are shared out as the optimizer does it (``owners.assign_owners``). Nothing is allocated, and no rank is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..fisher.step_limit import HOLD
from ..model.assemble import build_blocks, refuse_uninitialized
from ..model.block import Block
from ..model.estimate import estimate_of
from .owners import assign_owners

# What a rank sends of the bytes that it hands to a collective, times (ranks − 1)/ranks, on a ring.
SENT = {"all-reduce": 2, "reduce": 1, "broadcast": 1, "all-to-all": 1, "all-gather": 1}


@dataclass(frozen=True)
class Traffic:
    """What one rank hands to a collective, in bytes on average over ranks, once in ``every`` steps."""

    what: str
    collective: str
    payload: float
    every: int

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends in a step, on average over steps."""
        return SENT[self.collective] * self.payload * (ranks - 1) / ranks / self.every


@dataclass(frozen=True)
class Route:
    """A way to share out the work. ``own``: what the training without this optimizer sends anyway."""

    name: str
    memory: int  # bytes of optimizer state on the rank that has most
    traffic: tuple[Traffic, ...]
    own: tuple[Traffic, ...]

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends in a step for this optimizer, on average over steps."""
        return sum(t.sent(ranks) for t in self.traffic)


@dataclass(frozen=True)
class Plan:
    """For one number of ranks. ``print`` it for a table."""

    ranks: int
    parameters: int
    routes: tuple[Route, ...]

    def __str__(self) -> str:
        giga = lambda count: f"{count / 1e9:.3g}"
        lines = [f"{self.ranks} ranks, {self.parameters:,} parameters; GB of each rank, sent: in a step on average"]
        lines.append(f"{'':22} {'state':>8} {'sent':>8} {'without':>8}  of which")
        for route in self.routes:
            parts = ", ".join(f"{t.what} {giga(t.sent(self.ranks))}" for t in route.traffic)
            own = sum(t.sent(self.ranks) for t in route.own)
            sent = route.sent(self.ranks)
            lines.append(f"{route.name:22} {giga(route.memory):>8} {giga(sent):>8} {giga(own):>8}  {parts}")
        return "\n".join(lines)


def plan(
    model: nn.Module, ranks: int, update_aux_every: int = 0, anchor_every: int = 10, limit_every: int = HOLD
) -> Plan:
    """The routes for a model, which may be on the "meta" device, with those of ``FishLeg``'s arguments.
    ``limit_every``: steps between two that are measured for ``step_limit``, which a training decides as it goes; 0:
    without a limit.

    ValueError where ``ranks`` is less than 1.
    """
    if ranks < 1:
        raise ValueError(f"ranks should be at least 1 but is: {ranks}")
    refuse_uninitialized(model)
    params = [p for p in model.parameters() if p.requires_grad]
    blocks = build_blocks(model, params, "kron", "auto", device=torch.device("meta"))
    steps = update_aux_every, anchor_every, limit_every
    return Plan(ranks, sum(p.numel() for p in params), routes_of(blocks, ranks, *steps))


def routes_of(
    blocks: Sequence[Block], ranks: int, update_aux_every: int, anchor_every: int, limit_every: int
) -> tuple[Route, ...]:
    """DistributedDataParallel, with state on every rank and shared out; fully_shard."""
    parameters = float(sum(p.numel() * p.element_size() for b in blocks for p in (part.param for part in b.parts)))
    matrices = float(sum(b.shape[0] * b.shape[1] * b.dtype.itemsize for b in blocks))  # in λ's dtype
    moments = float(sum(t.nbytes for b in blocks for t in b.structure.new_moments().values()))
    learning, anchoring = abs(update_aux_every), anchor_every
    found = [estimate_of(b) for b in blocks]
    held = [e.state_bytes + e.cache_bytes + (e.learning_bytes if learning else 0) for e in found]
    owners = assign_owners(blocks, ranks)
    stand_ins = [b.shape[0] * b.shape[1] * b.dtype.itemsize for b in blocks]
    loads = [0] * ranks
    for owner, size, update in zip(owners, held, stand_ins, strict=True):
        loads[owner] += size + update

    def every(what: str, collective: str, payload: float, steps: int) -> list[Traffic]:
        return [Traffic(what, collective, payload, steps)] if steps else []

    curvature = [
        *every("v", "broadcast", matrices, learning),
        *every("F v", "reduce", matrices, learning),
        *every("moments", "reduce", moments, anchoring),
    ]
    replicated = [
        *every("F v", "all-reduce", matrices, learning),
        *every("moments", "all-reduce", moments, anchoring),
    ]
    # Where a step is measured each rank needs all updates: they are what it moves parameters by where it has those.
    measured = every("limit", "broadcast", matrices, limit_every)
    # fully_shard gathers parameters for each pass: three times for F v, twice for moments, once to measure a step.
    passes = [
        *every("passes for F v", "all-gather", 3 * parameters, learning),
        *every("passes for moments", "all-gather", 2 * parameters, anchoring),
        *every("pass for the limit", "all-gather", parameters, limit_every),
    ]
    updates = Traffic("updates", "broadcast", matrices, 1)
    gathered = Traffic("gradients", "all-to-all", parameters / ranks, 1)
    returned = Traffic("updates", "all-to-all", matrices / ranks, 1)
    averaged = (Traffic("gradients", "all-reduce", parameters, 1),)
    sharded = (Traffic("parameters and gradients", "all-gather", 3 * parameters, 1),)
    return (
        Route("DDP", sum(held), tuple(replicated), averaged),
        Route("DDP, shard_state=True", max(loads), (updates, *curvature), averaged),
        Route("fully_shard", max(loads), (gathered, returned, *curvature, *measured, *passes), sharded),
    )


class _Layer(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.attention = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(4))
        self.up = nn.ModuleList(nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)


def transformer_7b() -> nn.Module:
    """The layers of a transformer of 6.7 B parameters in bfloat16, on the "meta" device; it does not run."""
    with torch.device("meta"):
        layers = [_Layer(4096, 11008) for _ in range(32)]
        ends = nn.Embedding(32000, 4096), nn.RMSNorm(4096), nn.Linear(4096, 32000, bias=False)
        return nn.Sequential(*ends, *layers).bfloat16()
