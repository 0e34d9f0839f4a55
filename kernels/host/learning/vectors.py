"""u, v and F v of a λ step, as its kernels read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....algebra.low_rank import LowRank
from ....algebra.matrix import Matrix, dense
from ....model.block import Block
from ..tables.matrices import Given, Scales, unaligned
from ..tables.places import places


def is_low_rank(u: Matrix, v: Matrix) -> bool:
    """Whether the reference learns from these."""
    return isinstance(u, LowRank) or isinstance(v, LowRank)


def row_major(t: Tensor) -> Tensor:
    """(m, n) in float32 with unit stride of columns: a copy where it is not that."""
    t = t.to(torch.float32)
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


class Vectors:
    """u, v and F v of a step."""

    def __init__(
        self, blocks: Sequence[Block], us: Sequence[Matrix], vs: Sequence[Matrix], fvs: Sequence[Matrix]
    ) -> None:
        kinds = set(map(type, us)) | set(map(type, vs))
        plain = not any(issubclass(kind, LowRank) for kind in kinds)
        self.low_rank = None if plain else [is_low_rank(u, v) for u, v in zip(us, vs, strict=True)]
        self.u, self.scales = Given(us, blocks, scaled=True), Scales(us)
        self.v, self.fv = _tensors(vs), _tensors(fvs)

    def facts(self) -> tuple:
        """What has to be as it was for a plan to hold."""
        addresses, lie = places([*self.v, *self.fv])
        return self.low_rank, self.u.facts(), self.scales.facts(), lie, unaligned(addresses)


def _tensors(xs: Sequence[Matrix]) -> list[Tensor]:
    return list(xs) if set(map(type, xs)) == {Tensor} else [dense(x) for x in xs]  # type: ignore[arg-type]


def is_readable(t: Tensor) -> bool:
    """Whether kernels read it as it is: float32, with unit stride of columns."""
    return t.dtype == torch.float32 and (t.stride(1) == 1 or t.shape[1] == 1)
