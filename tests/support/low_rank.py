"""Random low-rank matrices, and which of P and S Q u is computed with."""

from __future__ import annotations

from fishleg_fast.algebra.low_rank import LowRank
from support.dense import randn

FORMED = {"both": None, "neither": (0, 0), "P": (99, 0), "S": (0, 99)}  # by how many vectors P and S will meet


def low_rank_matrix(rank: int, shape: tuple[int, int], seed: int = 0) -> LowRank:
    return LowRank(randn(rank, shape[0], seed=seed), randn(rank, shape[1], seed=seed + 1))
