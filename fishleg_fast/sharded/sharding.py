"""How a model lies on the ranks that share out its blocks: which rows of each parameter are where.

All of it is on each rank of a DistributedDataParallel; pieces are where it was given to ``fully_shard``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..model.block import Part, is_sharded


class Piece(NamedTuple):
    """What one rank has of a part: entries [start, stop) of the part along its dimension ``dim``, which are those from
    ``local`` on of the rank's own memory.
    """

    dim: int
    start: int
    stop: int
    local: int

    @property
    def length(self) -> int:
        """Along ``dim``."""
        return self.stop - self.start

    def shape(self, whole: torch.Size) -> torch.Size:
        """Of the piece of a part of that shape."""
        return torch.Size((*whole[: self.dim], self.length, *whole[self.dim + 1 :]))


def _units(model: nn.Module) -> list[nn.Module]:
    from torch.distributed.fsdp import FSDPModule

    return [m for m in model.modules() if isinstance(m, FSDPModule)]


class Sharding:
    """The ranks that share out the blocks of a model between them (``count``, of which this is number ``index``), and
    where ``fully_shard`` made several copies of it (HSDP) the ranks that hold the same pieces of the others.

    ``units``: the modules that were given to ``fully_shard``; none where every rank has all parameters.
    """

    def __init__(self, model: nn.Module, shards: Any, copies: Any = None) -> None:
        self.model, self.units = model, _units(model)
        self._shards, self._copies = shards, copies
        self.count, self.index = dist.get_world_size(shards), dist.get_rank(shards)
        self.group = shards if copies is None else dist.group.WORLD

    @staticmethod
    def of(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Sharding | None:
        """None where no module was given to ``fully_shard``. ValueError where a parameter is sharded otherwise."""
        sharded = [p for p in parameters if is_sharded(p)]
        if not sharded or not _units(model):
            return None
        names = {id(p): name for name, p in model.named_parameters()}
        mesh = sharded[0].device_mesh  # type: ignore[attr-defined]
        for p in sharded:
            _check_placements(p, names.get(id(p), "?"), mesh)
        if mesh.ndim == 2 and mesh.size() != dist.get_world_size():
            raise ValueError(
                f"a mesh of two dimensions should be of all {dist.get_world_size()} ranks but is of: {mesh.size()}"
            )
        return Sharding(model, mesh.get_group(mesh.ndim - 1), mesh.get_group(0) if mesh.ndim == 2 else None)

    def reshard(self) -> None:
        """Have every parameter sharded, as passes without a backward pass may leave some whole."""
        for unit in self.units:
            unit.reshard()  # type: ignore[operator]

    def piece(self, part: Part, rank: int) -> Piece:
        """What rank number ``rank`` has of a part; all of it where the parameter is not sharded."""
        shape = part.param.shape
        if not is_sharded(part.param):
            return Piece(0, 0, part.shape[0] if part.shape else 1, 0)
        dim: int = part.param.placements[-1].dim  # type: ignore[attr-defined]
        start, stop = _span(shape[dim], self.count, rank)
        if part.rows is None or dim:
            return Piece(dim, start, stop, 0)
        first, last, _ = part.rows.indices(shape[0])
        begin, end = max(start, first), min(stop, last)
        return Piece(0, begin - first, end - first, begin - start) if begin < end else Piece(0, 0, 0, 0)

    def local(self, part: Part, tensor: Tensor) -> Tensor:
        """This rank's piece of a part of ``tensor``, the parameter or its gradient: a view of its memory."""
        if not is_sharded(tensor):
            return part.of(tensor)
        mine = tensor.to_local()  # type: ignore[attr-defined]
        piece = self.piece(part, self.index)
        if part.rows is not None and piece.dim:
            mine = mine[part.rows]
        return mine.narrow(piece.dim, piece.local, piece.length)

    def to_owner(self, t: Tensor, owner: int) -> None:
        """Add t up over all ranks, in place: of use on the owner in each copy of the model alone."""
        dist.reduce(t, dist.get_global_rank(self._shards, owner), group=self._shards)
        if self._copies is not None and self.index == owner:
            dist.all_reduce(t, group=self._copies)

    def from_owner(self, t: Tensor, owner: int) -> None:
        """The owner's t on all ranks of its copy of the model, in place."""
        dist.broadcast(t, dist.get_global_rank(self._shards, owner), group=self._shards)

    def over_owners(self, t: Tensor) -> Tensor:
        """Σ of what each owner has, on all ranks."""
        t = t.detach().clone()
        dist.all_reduce(t, group=self._shards)
        return t

    def exchange(self, sent: Tensor, sizes: Sequence[int], received: Sequence[int]) -> Tensor:
        """All to all: ``sizes`` entries of ``sent`` to each rank, of which ``received`` come."""
        found = sent.new_empty(sum(received))
        dist.all_to_all_single(found, sent, list(received), list(sizes), group=self._shards)
        return found


def _span(size: int, count: int, rank: int) -> tuple[int, int]:
    """Which of ``size`` entries a rank has: as torch.chunk cuts them."""
    most = -(-size // count)
    return min(rank * most, size), min((rank + 1) * most, size)


def _check_placements(p: nn.Parameter, name: str, mesh: dist.DeviceMesh) -> None:
    placements = p.placements  # type: ignore[attr-defined]
    plain = type(placements[-1]).__name__ == "Shard" and all(q.is_replicate() for q in placements[:-1])
    if p.device_mesh != mesh or len(placements) > 2 or not plain:  # type: ignore[attr-defined]
        raise ValueError(
            f"parameter {name!r} should be sharded along one dimension, as fully_shard does, on the mesh of the others "
            f"({mesh}), but is placed as: {placements}; tensor parallel plans are not supported"
        )


def places(model: nn.Module, units: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, nn.Module, str, nn.Parameter]]:
    """(unit, module, name, parameter) of every place in which a module has a parameter: the unit is the innermost
    module that was given to ``fully_shard`` around it, which has it whole while it runs, or else the model, which has
    it whole at any time.
    """
    seen: set[tuple[int, str]] = set()
    for unit in (*reversed(units), model):
        for module in unit.modules():
            for name, p in module._parameters.items():
                if p is not None and (id(module), name) not in seen:
                    seen.add((id(module), name))
                    yield unit, module, name, p
