"""One Kron block's λ, P and S as packed operands of products."""

from __future__ import annotations

from typing import Any

from ...algebra.structures.base import LambdaVersion
from ...model.block import Block
from .packed_matrix import LEFT, MATRIX_UNITS, RIGHT, PackedMatrix, PackedScratch, ProductBatch


class PackedOperator(PackedScratch):
    """One block's λ, P and S as operands."""

    def __init__(self, block: Block, engine: str) -> None:
        super().__init__(engine)
        self.structure = block.structure
        self.m, self.n = block.shape
        self.P = PackedMatrix(engine, LEFT, self.m, self.m)
        self.S = PackedMatrix(engine, RIGHT, self.n, self.n)
        self._versions: dict[Any, LambdaVersion] = {}  # the λ that packed factors, or P and S ("PS"), are of

    def factor(self, batch: ProductBatch, name: str, side: int) -> PackedMatrix:
        """R, L, or a transpose, "R'" or "L'", of today's λ."""
        if side == RIGHT and self.engine not in MATRIX_UNITS:
            return self.factor(batch, name[0] if "'" in name else name + "'", LEFT).turned()
        factor, k = self.structure.fishleg_aux[name[0]], self.m if name[0] == "R" else self.n
        held = self.scratch(name, side, k, k)
        if not self._current((name, side)) and not batch.promises((id(self), (name, side))):
            batch.pack(factor.T if "'" in name else factor, held)
            self._promise(batch, (name, side))
        return held

    def _current(self, key: Any) -> bool:
        return self._versions.get(key) == self.structure.version

    def _promise(self, batch: ProductBatch, key: Any) -> None:
        """What ``key`` names is being written to, and of today's λ once the batch is done."""
        self._versions.pop(key, None)
        version = self.structure.version
        batch.then((id(self), key), lambda: self._versions.update({key: version}))

    @property
    def stale(self) -> bool:
        """Whether P and S are of another λ than today's."""
        return not self._current("PS")

    def form(self, batch: ProductBatch) -> None:
        """Have P = RᵀR and S = LLᵀ made."""
        batch.multiply(self.factor(batch, "R'", LEFT), self.factor(batch, "R", RIGHT), self.P, symmetric=True)
        batch.multiply(self.factor(batch, "L", LEFT), self.factor(batch, "L'", RIGHT), self.S, symmetric=True)
        self._promise(batch, "PS")

    def forget_factors(self) -> None:
        """Free the packed R and L, once P and S are made of them: as much as λ itself."""
        self._scratch = {key: held for key, held in self._scratch.items() if key[0][0] not in ("R", "L")}
        self._versions = {key: version for key, version in self._versions.items() if key == "PS"}

    def forget(self) -> None:
        """Free what the λ-gradients of a dense u alone take: several times the block's size."""
        self._scratch = {key: held for key, held in self._scratch.items() if "dense" not in key[0]}
