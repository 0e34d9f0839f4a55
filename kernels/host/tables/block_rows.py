"""Rows that describe blocks to the kernels (``row_layout.BlockFields``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ....model.block import Block
from ...device.row_layout import F
from ..launch import DTYPES
from .step_table import StepTable, Told
from .strides import Columns, columns, is_padded, padded
from .uploads import sent
from .workspace import LambdaBuffers, ProductBuffers


class Gradient(NamedTuple):
    """What a row's kernels read as the gradient."""

    cols: int  # of the weight
    weight: Told | None = None
    bias: Told | None = None
    scale: Told | None = None  # a device scalar that multiplies both

    @staticmethod
    def of(parts: Sequence[Told | None], cols: int, scale: Told | None = None) -> Gradient:
        """``parts``: the weight's and, if there is one, the bias's."""
        weight, bias = (*parts, None)[:2]
        return Gradient(cols, weight, bias, scale)


class Parameters(NamedTuple):
    """What a row's kernels move, None what they do not, and the learning rates that are on the device."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    lr: Tensor | None = None
    bias_lr: Tensor | None = None

    @staticmethod
    def of(parts: Sequence[tuple[Tensor | None, Tensor | None]]) -> Parameters:
        """``parts``: the weight and its learning rate and, if there is one, the bias and its."""
        (weight, lr), (bias, bias_lr) = (*parts, (None, None))[:2]
        return Parameters(weight, bias, lr, bias_lr)


class Scalars(NamedTuple):
    """Of a row's block: where its step counter, if the device counts, and its partial sums are."""

    step: Tensor | None = None
    slot: int = 0  # the first partial sum
    slots: int = 0  # and how many
    block: int = 0  # the block's number
    first: bool = True  # whether this is the row that writes the block's scalars
    hyper: int = 0  # the number of the address of its hyperparameters
    entries: int = 0  # ``F.ENTRIES``


class Piece(NamedTuple):
    """A row's share of a Diagonal block: the whole of it, or one of the parts that are below each other as one row."""

    shape: tuple[int, int]
    cols: int  # of the weight
    parts: slice  # of the block's parts
    entries: slice  # of the block's rows
    vector: bool  # whether it is one of several


NO_PARAMETERS, NO_SCALARS = Parameters(), Scalars()
_NOWHERE = Columns(0, 1, 1, 1)  # of a missing tensor


def pieces(block: Block) -> list[Piece]:
    """The rows that a Diagonal block takes."""
    if block.axis == 1:
        return [Piece(block.shape, weight_columns(block), slice(None), slice(None), False)]
    found, start = [], 0
    for k, part in enumerate(block.parts):
        count = part.of(part.param).numel()
        found.append(Piece((1, count), count, slice(k, k + 1), slice(start, start + count), True))
        start += count
    return found


def weight_columns(block: Block) -> int:
    """Columns of the weight: all but the bias."""
    return block.shape[1] - (len(block.parts) > 1)


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _rows(t: Tensor, m: int, n: int, vector: bool) -> tuple[int, int, bool]:
    """(stride of a row, columns that may be read, whether rows are whole vectors of 16 elements)."""
    if vector or m == 1:
        wide = n % 16 == 0 and t.data_ptr() % 16 == 0
        return 0, n, wide
    wide = is_padded(t)
    return t.stride(0), padded(n) if wide else n, wide


def _number(t: Told | None) -> int:
    return 0 if t is None else t.number


_TOLD = [F.OUT, F.X, F.V, F.GRAD, F.BIAS_GRAD, F.SCALE, F.HYPER]  # fields marked * in ``BlockFields``


@dataclass
class BlockRows:
    """Rows for one launch: gradients of one dtype, parameters of one dtype."""

    G: torch.dtype = torch.float32
    W: torch.dtype = torch.float32
    general: bool = False  # whether any gradient's or parameter's columns do not lie next to each other
    align: int = 16  # elements: of gradients and parameters
    align_x: int = 16  # of x
    align_v: int = 16  # of v
    values: list[int] = field(default_factory=list)
    shapes: list[tuple[int, int, int]] = field(default_factory=list)  # (m, n, terms) of each row

    def __len__(self) -> int:
        return len(self.shapes)

    def constants(self) -> dict:
        """What the kernels are compiled for."""
        return {**self.gradient_constants(), "ALIGN_X": self.align_x}

    def gradient_constants(self) -> dict:
        """The same for kernels that read no padding of x."""
        return {"G": DTYPES[self.G], "GENERAL": self.general, "ALIGN": self.align}

    def upload(self, device: torch.device, told: StepTable) -> Tensor:
        """The table of all rows, which point to ``told``."""
        values = torch.tensor(self.values, dtype=torch.int64, device="cpu").reshape(-1, F.LENGTH)
        values[:, _TOLD] = told.places(values[:, _TOLD])
        return sent(values, device)

    def append(
        self,
        shape: tuple[int, int],
        gradient: Gradient,
        *,
        buffers: ProductBuffers | None = None,  # None: a Diagonal's
        out: Told | None = None,  # of Q's second product
        A: Tensor | None = None,
        x: Told | None = None,
        v: Told | None = None,
        parameters: Parameters = NO_PARAMETERS,
        scalars: Scalars = NO_SCALARS,
        moments: tuple[Tensor, Tensor] | None = None,  # of a Diagonal's d
        scratch: LambdaBuffers | None = None,
        polar: tuple[Tensor, Tensor] | None = None,  # (m, np) and (n, mp)
        vector: bool = False,  # tensors of any shape are seen as one row
    ) -> None:
        """One row; names are the fields'."""
        m, n = shape
        terms = 1 if buffers is None else buffers.terms
        S, P, XT = (None,) * 3 if buffers is None else buffers[1:4]
        U, UT, WS = (None,) * 3 if scratch is None else scratch
        avg, avg_sq = moments or (None, None)
        POLAR, POLAR_T = polar or (None, None)
        self.values += F.pack(
            M=m, N=n, MP=padded(m), NP=padded(n), TERMS=terms, DIAGONAL=int(buffers is None),
            S=_at(S), P=_at(P), XT=_at(XT), OUT=_number(out), POLAR=_at(POLAR), POLAR_T=_at(POLAR_T),
            A=_at(A), LDA=0 if A is None or vector else A.stride(0),
            STEP=_at(scalars.step), HYPER=scalars.hyper, ENTRIES=scalars.entries,
            SLOT=scalars.slot, SLOTS=scalars.slots, INDEX=scalars.block,
            FIRST=int(scalars.first), U=_at(U), UT=_at(UT), WS=_at(WS), AVG=_at(avg), AVG_SQ=_at(avg_sq),
            **self._momentum(x, m, n, vector), **self._v(v, m, n, vector), **self._gradient(gradient, m, vector),
            **self._parameters(parameters, m, gradient.cols, vector),
        )  # fmt: skip
        self.shapes.append((m, n, terms))

    def _momentum(self, told: Told | None, m: int, n: int, vector: bool) -> dict[str, int]:
        if told is None:
            return {"X": 0, "LDX": 0, "X_COLS": 0}
        row, readable, wide = _rows(told.tensor, m, n, vector)
        self.align_x = self.align_x if wide else 1
        return {"X": told.number, "LDX": row, "X_COLS": readable}

    def _v(self, told: Told | None, m: int, n: int, vector: bool) -> dict[str, int]:
        if told is None:
            return {"V": 0, "LDV": 0, "V_COLS": 0}
        row, readable, wide = _rows(told.tensor, m, n, vector)
        self.align_v = self.align_v if wide else 1
        return {"V": told.number, "LDV": row, "V_COLS": readable}

    def _gradient(self, g: Gradient, m: int, vector: bool) -> dict[str, int]:
        where = _NOWHERE
        if g.weight is not None:
            found = columns(g.weight.tensor, vector)
            assert found is not None
            where = found
            self._align(g.weight.tensor, where, m, g.cols)
        return {
            "COLS": g.cols, "GRAD": _number(g.weight), "GRAD_COLS": 0 if g.weight is None else g.cols,
            "GRAD_ROW": 0 if vector else where.row,
            "GRAD_INNER": where.inner, "GRAD_OUTER": where.outer, "GRAD_STEP": where.step,
            "BIAS_GRAD": _number(g.bias), "BIAS_GRAD_ROW": 0 if g.bias is None else g.bias.tensor.stride(0),
            "SCALE": _number(g.scale),
        }  # fmt: skip

    def _parameters(self, p: Parameters, m: int, cols: int, vector: bool) -> dict[str, int]:
        where = _NOWHERE
        if p.weight is not None:
            found = columns(p.weight, vector)
            assert found is not None
            where = found
            self._align(p.weight, where, m, cols)
        return {
            "WEIGHT": _at(p.weight), "WEIGHT_ROW": 0 if vector else where.row,
            "WEIGHT_INNER": where.inner, "WEIGHT_OUTER": where.outer, "WEIGHT_STEP": where.step,
            "BIAS": _at(p.bias), "BIAS_ROW": 0 if p.bias is None else p.bias.stride(0),
            "LR": _at(p.lr), "BIAS_LR": _at(p.bias_lr),
        }  # fmt: skip

    def _align(self, t: Tensor, strides: Columns, rows: int, cols: int) -> None:
        """What is told of all rows, with a tensor more."""
        self.general |= not strides.plain and cols > 1
        row = strides.row if rows > 1 else 0
        widths = (row, cols) if t.data_ptr() % 16 == 0 else (1,)
        self.align = math.gcd(self.align, *widths)
        self.align = self.align if self.align in (16, 8, 4) else 1
