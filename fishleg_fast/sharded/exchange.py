"""Gradients of sharded parameters to the owners of their blocks, and updates back: one all-to-all each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model.block import Block, is_sharded
from .sharding import Sharding

Slot = tuple[int, int]  # numbers of a block and of one of its parts


class Exchange:
    """``layouts``: all blocks, on every rank, whose parts are the model's parameters; ``owners``: of each."""

    def __init__(self, sharding: Sharding, layouts: Sequence[Block], owners: Sequence[int]) -> None:
        self.sharding, self.layouts, self.owners = sharding, layouts, owners

    def _sent(self, slot: Slot, rank: int) -> int:
        """How many entries of a part's gradient come from a rank."""
        part = self.layouts[slot[0]].parts[slot[1]]
        sharded = is_sharded(part.param)
        return self.sharding.piece(part, rank).shape(part.shape).numel() if sharded else 0

    def _slots_of(self, slots: Sequence[Slot], owner: int) -> list[Slot]:
        return [slot for slot in slots if self.owners[slot[0]] == owner]

    def gather(self, grads: dict[Slot, Tensor]) -> dict[Slot, Tensor]:
        """Whole gradients of the parts of blocks that this rank owns, from the pieces of all: of the parts in
        ``grads``, which are the same ones on all ranks. Those of parameters that are not sharded are as they are here.
        """
        by_dtype: dict[torch.dtype, list[Slot]] = {}
        for slot, g in grads.items():
            by_dtype.setdefault(g.dtype, []).append(slot)
        found: dict[Slot, Tensor] = {}
        for slots in by_dtype.values():
            found |= self._gather(slots, grads)
        return found

    def _gather(self, slots: Sequence[Slot], grads: dict[Slot, Tensor]) -> dict[Slot, Tensor]:
        s = self.sharding
        mine = self._slots_of(slots, s.index)
        ordered = [slot for owner in range(s.count) for slot in self._slots_of(slots, owner)]
        sharded = [slot for slot in ordered if is_sharded(grads[slot])]
        pieces = [s.local(self.layouts[b].parts[k], grads[b, k]).reshape(-1) for b, k in sharded]
        sizes = [sum(self._sent(slot, s.index) for slot in self._slots_of(slots, owner)) for owner in range(s.count)]
        received = [sum(self._sent(slot, rank) for slot in mine) for rank in range(s.count)]
        flat = torch.cat(pieces) if pieces else next(iter(grads.values())).new_empty(0)
        come = s.exchange(flat, sizes, received).split(received) if sharded else ()
        found = {slot: _whole(self.layouts[slot[0]].parts[slot[1]].shape, grads[slot]) for slot in mine}
        for rank, flat in enumerate(come):
            at = 0
            for b, k in mine:
                if not (size := self._sent((b, k), rank)):
                    continue
                part = self.layouts[b].parts[k]
                piece = s.piece(part, rank)
                found[b, k].narrow(piece.dim, piece.start, piece.length).copy_(
                    flat[at : at + size].view(piece.shape(part.shape))
                )
                at += size
        for b, k in mine:
            if not is_sharded(grads[b, k]):
                found[b, k] = self.layouts[b].parts[k].of(grads[b, k])
        return found

    def scatter(self, slots: Sequence[Slot], updates: Callable[[Slot], Tensor]) -> Iterator[tuple[Slot, Tensor]]:
        """This rank's piece of the update of every part in ``slots``; ``updates``: the whole ones of those it owns."""
        by_dtype: dict[torch.dtype, list[Slot]] = {}
        for slot in slots:
            by_dtype.setdefault(self.layouts[slot[0]].dtype, []).append(slot)
        for together in by_dtype.values():
            sharded = [slot for slot in together if is_sharded(self.layouts[slot[0]].parts[slot[1]].param)]
            if sharded:
                yield from self._scatter(sharded, updates)
            if len(sharded) < len(together):
                yield from self.whole([slot for slot in together if slot not in sharded], updates)

    def whole(self, slots: Sequence[Slot], mine: Callable[[Slot], Tensor | None]) -> Iterator[tuple[Slot, Tensor]]:
        """What the owners of blocks have of these parts, zeros for None, on all ranks: a broadcast of each owner's.
        ``mine`` is asked for those of this rank.
        """
        for owner in range(self.sharding.count):
            theirs = self._slots_of(slots, owner)
            for dtype in sorted({self.layouts[b].dtype for b, _ in theirs}, key=str):
                these = [slot for slot in theirs if self.layouts[slot[0]].dtype == dtype]
                shapes = [self.layouts[b].parts[k].shape for b, k in these]
                device = self.layouts[these[0][0]].parts[0].param.device
                flat = torch.zeros(sum(s.numel() for s in shapes), dtype=dtype, device=device)
                pieces = [p.view(s) for p, s in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]
                for slot, piece in zip(these, pieces, strict=True):
                    if owner == self.sharding.index and (t := mine(slot)) is not None:
                        piece.copy_(t.reshape(piece.shape))
                self.sharding.from_owner(flat, owner)
                yield from zip(these, pieces, strict=True)

    def _scatter(self, slots: Sequence[Slot], updates: Callable[[Slot], Tensor]) -> Iterator[tuple[Slot, Tensor]]:
        s = self.sharding
        mine = self._slots_of(slots, s.index)
        pieces = []
        for rank in range(s.count):
            for b, k in mine:
                part = self.layouts[b].parts[k]
                piece = s.piece(part, rank)
                pieces.append(updates((b, k)).narrow(piece.dim, piece.start, piece.length).reshape(-1))
        sizes = [sum(self._sent(slot, rank) for slot in mine) for rank in range(s.count)]
        owned = [self._slots_of(slots, owner) for owner in range(s.count)]
        received = [sum(self._sent(slot, s.index) for slot in theirs) for theirs in owned]
        first = self.layouts[slots[0][0]]
        empty = torch.empty(0, dtype=first.dtype, device=first.parts[0].param.device)
        come = s.exchange(torch.cat(pieces) if pieces else empty, sizes, received).split(received)
        for theirs, flat in zip(owned, come, strict=True):
            at = 0
            for b, k in theirs:
                part = self.layouts[b].parts[k]
                shape = s.piece(part, s.index).shape(part.shape)
                size = self._sent((b, k), s.index)
                yield (b, k), flat[at : at + size].view(shape)
                at += size


class Directions:
    """A direction in all parameters: v of each part, less ``decay`` times the parameter where it has that.

    ``mine``: v of blocks that this rank owns. Others' come when they are asked for, by all ranks alike; ``keep``: once.
    """

    def __init__(
        self,
        exchange: Exchange,
        mine: Mapping[Slot, Tensor],
        decay: Mapping[Slot, Any] | None = None,
        keep: bool = False,
    ) -> None:
        self._exchange, self._keep = exchange, keep
        self.mine, self.decay = mine, decay or {}
        self._kept: dict[Slot, Tensor] = {}

    def of(self, slots: Sequence[Slot]) -> dict[Slot, Tensor]:
        """v of these parts, whole, on all ranks."""
        come = dict(self._exchange.whole([slot for slot in slots if slot not in self._kept], self.mine.get))
        if self._keep:
            self._kept |= come
        return {slot: come[slot] if slot in come else self._kept[slot] for slot in slots}

    def pieces(self, slots: Sequence[Slot]) -> Iterator[tuple[Slot, Tensor]]:
        """v of what this rank has of these parts; what is kept is whole, and is not sent again."""
        yield from ((slot, self._kept[slot]) for slot in slots if slot in self._kept)
        yield from self._exchange.scatter([slot for slot in slots if slot not in self._kept], self.mine.__getitem__)

    def along(self, slot: Slot, p: Tensor, v: Tensor) -> Tensor:
        """The direction in the part, of ``p``, it or a piece of it, and v there."""
        return v - self.decay[slot] * p.to(v.dtype) if slot in self.decay else v


def _whole(shape: torch.Size, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)
