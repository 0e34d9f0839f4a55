"""Rows that describe λ's factors to the kernels (``row_layout.FactorFields``): L as it is and R by its transpose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ....model.block import Block
from ...device.row_layout import K
from ..state import workspace_of
from .strides import padded
from .uploads import upload


class Factor(NamedTuple):
    """One of a block's factors, as λ holds it."""

    name: str  # in λ
    term: int  # of a SumKron; 0
    square: Tensor  # where F Fᵀ goes: S or P of the workspace
    transposed: bool  # whether F is the transpose of what λ holds


def factors_of(block: Block) -> list[Factor]:
    """Every factor of a block of Kron's kind."""
    workspace, mp = workspace_of(block), padded(block.shape[0])
    found = []
    for name in block.structure.fishleg_aux:
        if name[0] in "RL":
            term = int(name[1:]) - 1 if name[1:] else 0
            square = workspace.S[term] if name[0] == "L" else workspace.P[:, term * mp : (term + 1) * mp]
            found.append(Factor(name, term, square, name[0] == "R"))
    return found


class Learning(NamedTuple):
    """What a λ step needs of a factor besides."""

    avg: Tensor  # Adam's moments
    avg_sq: Tensor
    left: Tensor  # (k, depth): M = left rightᵀ
    right: Tensor
    sym: Tensor  # scratch for M + Mᵀ, the new F and ∂F
    new: Tensor
    grad: Tensor
    slot: int  # partial sums: the first, and how many
    slots: int
    place: int  # where their sum goes
    step: Tensor | None  # Adam's counter, if the device counts
    first: bool  # whether this is the row that writes the block's scalars


@dataclass
class FactorRows:
    """Rows for one launch."""

    align: int = 16  # elements, of λ
    values: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def upload(self, device: torch.device) -> Tensor:
        """The table of all rows."""
        return upload(self.values, torch.int64, device)

    def append(self, aux: Tensor, square: Tensor, transposed: bool, learning: Learning | None = None) -> None:
        """One row: λ's factor (k, k), and where F Fᵀ goes. ValueError where λ is not row-major."""
        k = aux.shape[0]
        if aux.stride(1) != 1 and k > 1:
            raise ValueError(f"λ should be row-major but has strides: {aux.stride()}; assign with copy_()")
        self.align = next(a for a in (16, 4, 1) if self.align % a == aux.stride(0) % a == k % a == 0)
        self.align = self.align if aux.data_ptr() % 16 == 0 else 1
        self.values += K.pack(
            SIZE=k, PADDED=padded(k), AUX=aux.data_ptr(), LD_AUX=aux.stride(0), SQUARE=square.data_ptr(),
            LD_SQUARE=square.stride(0), TRANSPOSED=int(transposed), **_learning_fields(learning),
        )  # fmt: skip
        self.sizes.append(k)


_NOT_LEARNED = dict.fromkeys("AVG AVG_SQ LEFT RIGHT DEPTH LD_RIGHT SYM NEW GRAD SLOT SLOTS INDEX STEP FIRST".split(), 0)


def _learning_fields(given: Learning | None) -> dict[str, int]:
    if given is None:
        return _NOT_LEARNED
    return {
        "AVG": given.avg.data_ptr(), "AVG_SQ": given.avg_sq.data_ptr(), "LEFT": given.left.data_ptr(),
        "RIGHT": given.right.data_ptr(), "DEPTH": given.left.stride(0), "LD_RIGHT": given.right.stride(0),
        "SYM": given.sym.data_ptr(), "NEW": given.new.data_ptr(), "GRAD": given.grad.data_ptr(), "SLOT": given.slot,
        "SLOTS": given.slots, "INDEX": given.place,
        "STEP": 0 if given.step is None else given.step.data_ptr(), "FIRST": int(given.first),
    }  # fmt: skip
