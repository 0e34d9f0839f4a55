"""Plans: what is prepared once for a list of blocks, found again at every step by what it depends on.

Between steps a plan holds no block and no gradient.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from ...model.block import Block
from .state import TritonState
from .tables import streams
from .tables.places import Versions, has_objects, objects, places

KEPT = 16  # plans of the same first block: of every op, and of the layouts that gradients have in turn


class Snapshot:
    """What rows depend on of the blocks, but for what a step gives: which objects they have, and where tensors are.

    It is compared at every step, for all blocks together, since host work is counted in microseconds.
    """

    def __init__(self, blocks: list[Block], learning: bool = False) -> None:
        self.ids, self._learning = list(map(id, blocks)), learning
        self.steps = [b.step for b in blocks]
        self._objects = objects(blocks, learning)
        self._aux, self._versions = [t for b in blocks for t in b.structure.fishleg_aux.values()], Versions()
        params = [p for b in blocks for p in b.params]
        self._watched = [*params, *(b.momentum for b in blocks), *(self._aux if learning else ())]
        self._places = places(self._watched)

    def holds(self, blocks: list[Block]) -> bool:
        """Whether everything is as it was: also where tensors are, since ``.data`` may have been assigned to."""
        return (
            list(map(id, blocks)) == self.ids
            and has_objects(blocks, self._learning, self._objects)
            and places(self._watched) == self._places
        )

    def written(self) -> bool:
        """Whether any λ was written to since this was last asked."""
        return self._versions.moved(self._aux)


class Plan:
    """What plans of every op have. ``key``, ``given``: what they are found by, besides the blocks."""

    key: Hashable
    given: tuple

    def __init__(self, blocks: Sequence[Block], learning: bool = False) -> None:
        self.refs = [weakref.ref(b) for b in blocks]
        self.snapshot = Snapshot(list(blocks), learning)
        # Outer diagonals, and learning rates that are tensors: (block, where it keeps them, under which name, place).
        self._elsewhere: list[tuple] = []
        for ref, block in zip(self.refs, blocks, strict=True):
            aux = block.structure.fishleg_aux
            self._elsewhere += [(ref, "aux", name, _place(aux[name])) for name in "ABd" if name in aux]
        seen: set[int] = set()
        for ref, block in zip(self.refs, blocks, strict=True):
            for k, group in enumerate(block.groups):
                if id(group) not in seen:
                    seen.add(id(group))
                    self._elsewhere.append((ref, "lr", k, _place(group["lr"])))

    def holds(self, blocks: list[Block]) -> bool:
        """Whether everything that its rows point to is where it was."""
        if not self.snapshot.holds(blocks):
            return False
        for ref, kept, name, place in self._elsewhere:
            block = ref()
            if _place(block.structure.fishleg_aux[name] if kept == "aux" else block.groups[name]["lr"]) != place:
                return False
        return True

    def needs_refresh(self) -> bool:
        """Whether λ was written to since this was last asked."""
        return self.snapshot.written()

    def refreshed(self) -> None:
        """λ was written to, and what depends on it is up to date."""
        self.snapshot.written()


def _place(tensor: Any) -> tuple | None:
    """Where a tensor is, and what it is; None for what is none."""
    if not isinstance(tensor, Tensor):
        return None
    return tensor.data_ptr(), tensor.stride(), tensor.dtype, tensor.device


Kind = TypeVar("Kind", bound=Plan)


def plan_of(blocks: Sequence[Block], key: Hashable, given: tuple, make: Callable[[], Kind]) -> Kind:
    """That of an earlier step where everything is as it was. A captured graph has one of its own, which is kept.

    given: what tells one step from another, and changes from step to step.
    """
    device = blocks[0].momentum.device
    if device.type == "cuda" and streams.capturing():
        plan = make()
        streams.keep(plan)
        return plan
    known: list[Any] = blocks[0].kept(TritonState).plans
    key, mine = (key, streams.stream_of(device)), list(blocks)
    for at, plan in enumerate(known):
        if plan.key == key and plan.given == given and plan.holds(mine):
            if at:
                known.insert(0, known.pop(at))
            return plan
    ids = list(map(id, blocks))
    known[:] = [p for p in known if all(r() is not None for r in p.refs) and (p.snapshot.ids != ids or p.holds(mine))]
    plan = make()
    plan.key, plan.given = key, given
    known.insert(0, plan)
    del known[KEPT:]
    return plan
