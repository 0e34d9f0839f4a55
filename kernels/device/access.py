"""Tiles of blocks, read and written as schedules and rows say, and the scalars that rows point to.

Fields of rows that are marked * say where an address is told (``row_layout.BlockFields``).

A kernel runs over a schedule's tiles: (number of a row, tile of rows i, tile of columns j, one number more).
r and c are a tile's row and column indices, int32 of shapes that broadcast; ``inside`` masks rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import one_minus_power
from .row_layout import F, H


@triton.jit
def scheduled(schedule, t, rows, LENGTH: tl.constexpr):
    """Entry t of a schedule: its address, the number of its row, the row, i and j."""
    entry = schedule + t * 4
    number = tl.load(entry)
    row = rows + number * LENGTH
    return entry, number, row, tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def scheduled_step(schedule, t, rows):
    """The same in a θ step: its address, the row, the row's hyperparameters, i and j."""
    entry = schedule + t * 4
    row = rows + tl.load(entry) * F.LENGTH
    return entry, row, told_address(row, F.HYPER, tl.float32, 1), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def last_number(entry):
    """What an entry of a schedule ends with."""
    return tl.load(entry + 3)


@triton.jit
def tile_indices(i, j, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Indices of rows, and of columns, in tile (i, j), as vectors."""
    return i * ROWS + tl.arange(0, ROWS), j * COLS + tl.arange(0, COLS)


@triton.jit
def tile_grid(i, j, ROWS: tl.constexpr, COLS: tl.constexpr):
    """r (ROWS, 1) and c (1, COLS) of tile (i, j)."""
    return (i * ROWS + tl.arange(0, ROWS))[:, None], (j * COLS + tl.arange(0, COLS))[None, :]


@triton.jit
def field(row, FIELD: tl.constexpr):
    return tl.load(row + FIELD)


@triton.jit
def leading(row, FIELD: tl.constexpr, ALIGN: tl.constexpr):
    """A size or stride that is a multiple of ALIGN elements."""
    return tl.multiple_of(tl.load(row + FIELD), ALIGN)


@triton.jit
def address(row, FIELD: tl.constexpr, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """A pointer, to 16 bytes where ALIGN > 1."""
    pointer = tl.load(row + FIELD).to(tl.pointer_type(DTYPE))
    if ALIGN > 1:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def told(row, FIELD: tl.constexpr):
    """The address that a field marked * leads to, 0 for a tensor that there is not."""
    return tl.load(tl.load(row + FIELD).to(tl.pointer_type(tl.int64)))


@triton.jit
def told_address(row, FIELD: tl.constexpr, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """The same as a pointer, to 16 bytes where ALIGN > 1."""
    pointer = told(row, FIELD).to(tl.pointer_type(DTYPE))
    if ALIGN > 1:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def matrix(row, FIELD: tl.constexpr, LD: tl.constexpr, r, c, inside, limit, ALIGN: tl.constexpr):
    """A tile of a float32 matrix that a field marked * leads to, of columns c < limit."""
    at = told_address(row, FIELD, tl.float32, ALIGN) + r * leading(row, LD, ALIGN) + c
    return tl.load(at, mask=inside & (c < limit), other=0)


@triton.jit
def diagonal_matrix(row, r, c, inside):
    """A tile of a Diagonal's d."""
    at = address(row, F.A, tl.float32, 1) + r * field(row, F.LDA) + c
    return tl.load(at, mask=inside & (c < field(row, F.N)), other=0)


@triton.jit
def outer_diagonal(row, r, c, inside):
    """A tile of the outer diagonal A, or ones."""
    at = address(row, F.A, tl.float32, 1) + r * field(row, F.LDA) + c
    return tl.load(at, mask=inside & (c < field(row, F.N)) & (field(row, F.A) != 0), other=1.0)


@triton.jit
def column_pointers(start, row, c, INNER: tl.constexpr, OUTER: tl.constexpr, STEP: tl.constexpr, GENERAL: tl.constexpr):
    """Where columns c are, from pointers to the starts of rows: next to each other, or in GENERAL by two strides."""
    if GENERAL:
        inner = field(row, INNER).to(tl.int32)
        at = start + (c // inner) * field(row, OUTER) + (c % inner) * field(row, STEP)
    else:
        at = start + c
    return at


@triton.jit
def gradient(row, r, c, inside, G: tl.constexpr, GENERAL: tl.constexpr, ALIGN: tl.constexpr):
    """A tile of the gradient, float32."""
    cols = leading(row, F.GRAD_COLS, ALIGN)
    start = told_address(row, F.GRAD, G, ALIGN) + r * leading(row, F.GRAD_ROW, ALIGN)
    at = column_pointers(start, row, c, F.GRAD_INNER, F.GRAD_OUTER, F.GRAD_STEP, GENERAL)
    g = tl.load(at, mask=inside & (c < cols), other=0).to(tl.float32)
    bias = told(row, F.BIAS_GRAD)
    at = bias.to(tl.pointer_type(G)) + r * field(row, F.BIAS_GRAD_ROW)
    b = tl.load(at, mask=inside & (bias != 0), other=0).to(tl.float32)
    return g + tl.where(c == field(row, F.COLS), b, 0)


@triton.jit
def gradient_scale(row):
    """The device scalar that multiplies the gradient, or 1."""
    at = told(row, F.SCALE)
    return tl.load(at.to(tl.pointer_type(tl.float32)), mask=at != 0, other=1.0)


@triton.jit
def weight_pointers(row, r, c, GENERAL: tl.constexpr, W: tl.constexpr, ALIGN: tl.constexpr):
    """Where a tile of the weight is."""
    start = address(row, F.WEIGHT, W, ALIGN) + r * leading(row, F.WEIGHT_ROW, ALIGN)
    return column_pointers(start, row, c, F.WEIGHT_INNER, F.WEIGHT_OUTER, F.WEIGHT_STEP, GENERAL)


@triton.jit
def learning_rate(row, hyper, FIELD: tl.constexpr, HYPER: tl.constexpr):
    """lr of the weight or the bias: from the device, or as the host tells it."""
    given = tl.load(row + FIELD)
    return tl.load(given.to(tl.pointer_type(tl.float32)), mask=given != 0, other=tl.load(hyper + HYPER))


@triton.jit
def counter(row, FIELD: tl.constexpr):
    """A step counter on the device, 0 where the host counts."""
    at = tl.load(row + FIELD)
    return tl.load(at.to(tl.pointer_type(tl.float32)), mask=at != 0, other=0)


@triton.jit
def increment(row, FIELD: tl.constexpr, ok):
    """Raise a step counter where ``ok``, if the device counts."""
    at = tl.load(row + FIELD)
    tl.store(at.to(tl.pointer_type(tl.float32)), counter(row, FIELD) + 1, mask=(at != 0) & ok)


@triton.jit
def momentum_correction(row, hyper):
    """1 − β^(t + times)."""
    counted = one_minus_power(tl.load(hyper + H.LOG2_BETA), counter(row, F.STEP) + tl.load(hyper + H.TIMES))
    return tl.where(tl.load(row + F.STEP) != 0, counted, tl.load(hyper + H.CORRECTION))
