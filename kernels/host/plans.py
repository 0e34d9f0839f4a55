"""Plans: what is prepared once for a list of blocks, found again at every step by what it depends on.

Between steps a plan holds no block and no gradient.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from operator import attrgetter, is_, methodcaller
from typing import Any, TypeVar

from torch import Tensor

from ...model.block import Block
from .state import TritonState
from .tables import streams
from .tables.places import places

KEPT = 16  # plans of the same first block: of every op, and of the layouts that gradients have in turn

_of_block = attrgetter("structure", "momentum", "step", "spectral", "groups", "parts", "grads")
_of_structure = attrgetter("fishleg_aux", "precision")
_of_learning = attrgetter("exp_avg", "exp_avg_sq", "aux_step")
_param, _aux = attrgetter("param"), attrgetter("fishleg_aux")
_version = attrgetter("_version")
_values = methodcaller("values")
_flat = chain.from_iterable


def _same(found: Sequence[object], known: Sequence[object]) -> bool:
    """Whether these are the very same objects. Tensors are not to be compared by ==."""
    return len(found) == len(known) and all(map(is_, found, known))


class Blocks:
    """The blocks of a step, and what all of them have, by attribute."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.ids = list(map(id, blocks))
        *self.own, self.groups, self.parts, self.grads = zip(*map(_of_block, blocks), strict=True)


class Snapshot:
    """What rows depend on of the blocks, but for what a step gives: which objects they have, and where parameters are.

    It is compared at every step, for all blocks together, since host work is counted in microseconds.
    """

    def __init__(self, blocks: Sequence[Block], now: Blocks, learning: bool = False) -> None:
        self.ids, self._own = now.ids, now.own
        self._structures, self._momenta, self.steps, _ = now.own
        self._of_structures = list(_flat(map(_of_structure, self._structures)))
        self._auxes = list(map(_aux, self._structures))
        self._aux = list(_flat(map(_values, self._auxes)))
        self._groups = list(_flat(now.groups))
        self._params = list(map(_param, _flat(now.parts)))
        self._learning = learning  # whether rows point to λ and Adam's state
        self._places = self._of_tensors()
        self._state = self._of_state(blocks)

    def _of_tensors(self) -> tuple:
        """Where tensors are, since ``.data`` may have been assigned to, and what parameters are."""
        return places([*self._params, *self._momenta, *(self._aux if self._learning else ())])

    def holds(self, blocks: Sequence[Block], now: Blocks) -> bool:
        """Whether everything is as it was."""
        return (
            now.ids == self.ids
            and all(map(_same, now.own, self._own))
            and _same(list(_flat(now.groups)), self._groups)
            and _same(list(map(_param, _flat(now.parts))), self._params)
            and _same(list(_flat(map(_of_structure, self._structures))), self._of_structures)
            and _same(list(_flat(map(_values, self._auxes))), self._aux)
            and _same(self._of_state(blocks), self._state)
            and self._of_tensors() == self._places
        )

    def _of_state(self, blocks: Sequence[Block]) -> list[object]:
        """Adam's moments and counters."""
        if not self._learning:
            return []
        averages, squares, counters = zip(*map(_of_learning, blocks), strict=True)
        return [*counters, *_flat(map(_values, averages)), *_flat(map(_values, squares))]

    def version(self) -> list[int]:
        """Changes whenever any λ is written to."""
        return list(map(_version, self._aux))


class Plan:
    """What plans of every op have. ``key``, ``given``: what they are found by, besides the blocks."""

    key: Hashable
    given: tuple

    def __init__(self, blocks: Sequence[Block], now: Blocks, learning: bool = False) -> None:
        self.refs = [weakref.ref(b) for b in blocks]
        self.snapshot = Snapshot(blocks, now, learning)
        self._fresh: list[int] | None = None
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

    def holds(self, blocks: Sequence[Block], now: Blocks) -> bool:
        """Whether everything that its rows point to is where it was."""
        if not self.snapshot.holds(blocks, now):
            return False
        for ref, kept, name, place in self._elsewhere:
            block = ref()
            if _place(block.structure.fishleg_aux[name] if kept == "aux" else block.groups[name]["lr"]) != place:
                return False
        return True

    def needs_refresh(self) -> bool:
        """Whether λ was written to since this was last asked."""
        before, self._fresh = self._fresh, self.snapshot.version()
        return before != self._fresh

    def refreshed(self) -> None:
        """λ was written to, and what depends on it is up to date."""
        self._fresh = self.snapshot.version()


def _place(tensor: Any) -> tuple | None:
    """Where a tensor is, and what it is; None for what is none."""
    if not isinstance(tensor, Tensor):
        return None
    return tensor.data_ptr(), tensor.stride(), tensor.dtype, tensor.device


Kind = TypeVar("Kind", bound=Plan)


def plan_of(blocks: Sequence[Block], now: Blocks, key: Hashable, given: tuple, make: Callable[[], Kind]) -> Kind:
    """That of an earlier step where everything is as it was. A captured graph has one of its own, which is kept.

    given: what tells one step from another, and changes from step to step.
    """
    device = blocks[0].momentum.device
    if device.type == "cuda" and streams.capturing():
        plan = make()
        streams.keep(plan)
        return plan
    known: list[Any] = blocks[0].kept(TritonState).plans
    key = key, streams.stream_of(device)
    for at, plan in enumerate(known):
        if plan.key == key and plan.given == given and plan.holds(blocks, now):
            if at:
                known.insert(0, known.pop(at))
            return plan
    known[:] = [
        p for p in known if all(r() is not None for r in p.refs) and (p.snapshot.ids != now.ids or p.holds(blocks, now))
    ]
    plan = make()
    plan.key, plan.given = key, given
    known.insert(0, plan)
    del known[KEPT:]
    return plan
