"""P, S and A of blocks: formed where λ has moved on, and where they are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...algebra.maths import Aux
from ...model.block import Block
from .coverage import ALIGNED, BlockFacts
from .plans import Op, Watch
from .state import CudaState, plan_of


class Operators:
    """Those of a list of covered blocks, which several plans have: P, S and A of each, or d and two None."""

    def __init__(self, blocks: Sequence[Block], facts: Sequence[BlockFacts]) -> None:
        self.watch = Watch(blocks)
        self.tensors: list[Tensor | None] = []
        self.generation = 0  # of tensors
        self._facts = list(facts)
        self._caches: list[Aux] = [{} for _ in facts]  # as this has adopted them

    def update(self, blocks: Sequence[Block]) -> None:
        """Form them anew where λ has been written to; these are the blocks that they are of."""
        if not self.watch.moved():
            return
        self.generation += 1
        try:
            formed = self._form(blocks)
        except BaseException:
            self.watch.forget()
            raise
        self.tensors = []
        for k, (block, facts) in enumerate(zip(blocks, self._facts, strict=True)):
            aux = block.structure.fishleg_aux
            if facts.kronecker:
                cache = self._caches[k] if k in formed else block.structure.cache
                self.tensors += (cache["P"], cache["S"], aux.get("A"))
            else:
                self.tensors += (aux["d"], None, None)

    def _form(self, blocks: Sequence[Block]) -> set[int]:
        """P and S where they are not today's: the numbers of those blocks."""
        stale = [
            k
            for k, (b, f) in enumerate(zip(blocks, self._facts, strict=True))
            if f.kronecker and not b.structure.holds("P", "S")
        ]
        if not stale:
            return set()
        ours = [blocks[k] for k in stale]
        matrices: list[Tensor] = []
        for k, block in zip(stale, ours, strict=True):
            R, L = block.structure.fishleg_aux["R"], block.structure.fishleg_aux["L"]
            cache = self._caches[k] = self._caches[k] or block.structure.cache_memory(ALIGNED, P=R, S=L)
            matrices += (R, L, cache["P"], cache["S"])
        plan = plan_of(Op.REFRESH, ours, [self._facts[k] for k in stale], [None] * len(ours))
        if not plan.native.refresh(plan.stream, matrices):
            raise RuntimeError(f"R, L, P or S of a block is not float32 on {plan.device} any more, or of another shape")
        for k, block in zip(stale, ours, strict=True):
            block.structure.adopt(self._caches[k])
        return set(stale)


def operators_of(
    state: CudaState, covered: Sequence[bool], ours: Sequence[Block], facts: Sequence[BlockFacts]
) -> Operators:
    """Looked up among those of the lists that start with the state's block: by which blocks of a list are covered."""
    key = tuple(covered)
    found = state.operators.get(key)
    if found is None or not found.watch.same(ours):
        found = state.operators[key] = Operators(ours, facts)
    return found
