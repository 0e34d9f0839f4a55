"""Rows that describe blocks to the kernels (``row_layout.BlockFields``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ....algebra.matrix import Matrix
from ....model.block import Block
from ....model.gradients import GradientInPlace
from ...device.row_layout import F
from ..launch import DTYPES
from .strides import Columns, columns, is_padded, padded, with_columns
from .uploads import upload
from .workspace import LambdaBuffers, ProductBuffers


class BlockMatrix(NamedTuple):
    """A matrix (m, n) as a block's parameters hold it, in one of DTYPES: a gradient, or a vector of its form."""

    parts: list[Tensor | None]  # one a part, in the part's shape or (m, columns)
    scale: Tensor | None  # a device scalar that multiplies them, float32
    dtype: torch.dtype
    copied: bool  # whether any of the parts is a copy


def block_matrix(block: Block, g: Matrix) -> BlockMatrix:
    """g as the kernels read it: where it is, but for a copy of what has another dtype."""
    scale = None
    if isinstance(g, Tensor):
        sizes = [part.of(part.param).numel() // (block.shape[0] if block.axis else 1) for part in block.parts]
        split = g.split(sizes, dim=block.axis)
        found = [s.select(1, 0) if block.axis == 0 or (k and block.axis) else s for k, s in enumerate(split)]
    else:
        found = [None if t is None else t if t.layout == torch.strided else t.to_dense() for t in block.grads]
        scale = g.scale if isinstance(g, GradientInPlace) else None
    dtype = next((t.dtype for t in found if t is not None), torch.float32)
    dtype = dtype if dtype in DTYPES else torch.float32
    parts = [None if t is None else t.to(dtype) for t in found]
    copied = any(a is not b for a, b in zip(parts, found, strict=True))
    return BlockMatrix(parts, None if scale is None else scale.to(block.momentum.device, torch.float32), dtype, copied)


class Gradient(NamedTuple):
    """What a row's kernels read as the gradient."""

    cols: int  # of the weight
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None  # a device scalar that multiplies both

    @staticmethod
    def of(parts: Sequence[Tensor | None], cols: int, scale: Tensor | None = None) -> Gradient:
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


@dataclass
class BlockRows:
    """Rows for one launch: gradients of one dtype, parameters of one dtype."""

    G: torch.dtype = torch.float32
    W: torch.dtype = torch.float32
    general: bool = False  # whether any gradient's or parameter's columns do not lie next to each other
    align: int = 16  # elements: of gradients and parameters
    align_x: int = 16  # of x
    values: list[int] = field(default_factory=list)
    shapes: list[tuple[int, int, int]] = field(default_factory=list)  # (m, n, terms) of each row
    keep_alive: list[Tensor] = field(default_factory=list)  # what the kernels read, until they are launched
    copied: bool = False  # whether any of that is a copy

    def __len__(self) -> int:
        return len(self.shapes)

    def constants(self) -> dict:
        """What the kernels are compiled for."""
        return {**self.gradient_constants(), "ALIGN_X": self.align_x}

    def gradient_constants(self) -> dict:
        """The same for kernels that read no padding of x."""
        return {"G": DTYPES[self.G], "GENERAL": self.general, "ALIGN": self.align}

    def upload(self, device: torch.device) -> Tensor:
        """The table of all rows."""
        return upload(self.values, torch.int64, device)

    def append(
        self,
        shape: tuple[int, int],
        gradient: Gradient,
        *,
        buffers: ProductBuffers | None = None,  # None: a Diagonal's
        A: Tensor | None = None,
        x: Tensor | None = None,
        v: Tensor | None = None,
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
        S, P, XT, OUT = (None,) * 4 if buffers is None else buffers[1:]
        U, UT, WS = (None,) * 3 if scratch is None else scratch
        avg, avg_sq = moments or (None, None)
        POLAR, POLAR_T = polar or (None, None)
        self.values += F.pack(
            M=m, N=n, MP=padded(m), NP=padded(n), TERMS=terms, DIAGONAL=int(buffers is None),
            S=_at(S), P=_at(P), XT=_at(XT), OUT=_at(OUT), POLAR=_at(POLAR), POLAR_T=_at(POLAR_T),
            A=_at(A), LDA=0 if A is None or vector else A.stride(0),
            V=_at(v), LDV=0 if v is None else v.stride(0),
            STEP=_at(scalars.step), SLOT=scalars.slot, SLOTS=scalars.slots, INDEX=scalars.block,
            FIRST=int(scalars.first), U=_at(U), UT=_at(UT), WS=_at(WS), AVG=_at(avg), AVG_SQ=_at(avg_sq),
            **self._momentum(x, m, n, vector), **self._gradient(gradient, m, vector),
            **self._parameters(parameters, m, gradient.cols, vector),
        )  # fmt: skip
        self.shapes.append((m, n, terms))
        self.keep_alive += [t for t in (gradient.bias, gradient.scale, v) if t is not None]

    def _momentum(self, x: Tensor | None, m: int, n: int, vector: bool) -> dict[str, int]:
        if x is None:
            return {"X": 0, "LDX": 0, "X_COLS": 0}
        if vector or m == 1:
            wide = n % 16 == 0 and x.data_ptr() % 16 == 0
            row, readable = 0, n
        else:
            wide = is_padded(x)
            row, readable = x.stride(0), padded(n) if wide else n
        self.align_x = self.align_x if wide else 1
        return {"X": x.data_ptr(), "LDX": row, "X_COLS": readable}

    def _gradient(self, g: Gradient, m: int, vector: bool) -> dict[str, int]:
        weight, where = g.weight, _NOWHERE
        if weight is not None:
            weight, where = with_columns(weight, vector)
            self._align(weight, where, m, g.cols)
            self.keep_alive.append(weight)
            self.copied |= weight is not g.weight
        return {
            "COLS": g.cols, "GRAD": _at(weight), "GRAD_COLS": 0 if weight is None else g.cols,
            "GRAD_ROW": 0 if vector else where.row,
            "GRAD_INNER": where.inner, "GRAD_OUTER": where.outer, "GRAD_STEP": where.step,
            "BIAS_GRAD": _at(g.bias), "BIAS_GRAD_ROW": 0 if g.bias is None else g.bias.stride(0), "SCALE": _at(g.scale),
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
