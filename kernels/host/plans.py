"""Plans: what is prepared once for a list of blocks, found again at every step by what it depends on.

Between steps a plan holds no block and no gradient.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter
from typing import Any, TypeVar

from torch import Tensor

from ...model.block import Block
from .state import TritonState
from .tables import streams
from .tables.places import Versions, flattened, identical, places

KEPT = 16  # plans of the same first block: of every op, and of the layouts that gradients have in turn

_OF_BLOCK = ("structure", "momentum", "step", "spectral")
_of_block = [attrgetter(name) for name in _OF_BLOCK]
_precision, _aux = attrgetter("precision"), attrgetter("fishleg_aux")
_grads, _counter = attrgetter("grads"), attrgetter("aux_step")


class Blocks:
    """The blocks of a step, and what all of them have, by attribute."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = list(blocks)
        self.own = [list(map(of, self.blocks)) for of in _of_block]
        self.grads = list(map(_grads, self.blocks))


class Snapshot:
    """What rows depend on of the blocks, but for what a step gives: which objects they have, and where parameters are.

    It is compared at every step, for all blocks together, since host work is counted in microseconds.
    """

    def __init__(self, now: Blocks, learning: bool = False) -> None:
        self.ids, self._own, self._learning = list(map(id, now.blocks)), now.own, learning
        self._structures, self._momenta, self.steps, _ = now.own
        self._params = flattened(now.blocks, "params")
        self._aux = flattened(self._structures, "fishleg_aux")
        self._kept, self._versions = self._of_lists(now), Versions()
        self._places = self._of_tensors()

    def _of_tensors(self) -> tuple:
        """Where tensors are, since ``.data`` may have been assigned to, and how they lie."""
        return places([*self._params, *self._momenta, *(self._aux if self._learning else ())])

    def _of_lists(self, now: Blocks) -> list[list]:
        """The objects that are told apart by identity: also λ's own dict, of whose tensors there may be others."""
        structures = now.own[0]
        found = [
            flattened(now.blocks, "groups"),
            flattened(now.blocks, "params"),
            list(map(_precision, structures)),
            list(map(_aux, structures)),
            flattened(structures, "fishleg_aux"),
        ]
        if self._learning:  # Adam's moments and counters, which rows point to as they do to λ
            averages, squares = flattened(now.blocks, "exp_avg"), flattened(now.blocks, "exp_avg_sq")
            found += [averages, squares, list(map(_counter, now.blocks))]
        return found

    def holds(self, now: Blocks) -> bool:
        """Whether everything is as it was."""
        return (
            list(map(id, now.blocks)) == self.ids
            and all(map(identical, now.own, self._own))
            and all(map(identical, self._of_lists(now), self._kept))
            and self._of_tensors() == self._places
        )

    def written(self) -> bool:
        """Whether any λ was written to since this was last asked."""
        return self._versions.moved(self._aux)


class Plan:
    """What plans of every op have. ``key``, ``given``: what they are found by, besides the blocks."""

    key: Hashable
    given: tuple

    def __init__(self, blocks: Sequence[Block], now: Blocks, learning: bool = False) -> None:
        self.refs = [weakref.ref(b) for b in blocks]
        self.snapshot = Snapshot(now, learning)
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
        if not self.snapshot.holds(now):
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
    ids = list(map(id, blocks))
    known[:] = [
        p for p in known if all(r() is not None for r in p.refs) and (p.snapshot.ids != ids or p.holds(blocks, now))
    ]
    plan = make()
    plan.key, plan.given = key, given
    known.insert(0, plan)
    del known[KEPT:]
    return plan
