"""What a row of a table holds: one list of fields each, for the kernels' offsets and for the host, which packs by name.

A row describes a block (F), its hyperparameters (H), one of λ's factors (K), a matrix whose polar factor is computed
(POLAR), or two tensors (PAIR) to the kernels. They read a field as ``tl.load(row + F.M)``.
"""

from __future__ import annotations

import inspect
from collections import namedtuple
from operator import itemgetter
from typing import TypeVar

import triton.language as tl

Number = TypeVar("Number", int, float)


class Fields(tl.constexpr):
    """What a subclass annotates, numbered in that order: every name is an attribute, an int. LENGTH: how many.

    Triton lets kernels use a global only if it is a constexpr, and compiles anew where its value changes: this one's
    is all names with their numbers.
    """

    LENGTH: int

    def __init__(self) -> None:
        names = tuple(inspect.get_annotations(type(self)))
        offsets = namedtuple(type(self).__name__, (*names, "LENGTH"))(*range(len(names) + 1))
        super().__init__(offsets)  # attributes of the value are what the compiler sees, those of self the interpreter
        vars(self).update(offsets._asdict())
        self._known, self._in_order = frozenset(names), itemgetter(*names)

    def pack(self, **values: Number) -> tuple[Number, ...]:
        """A row. TypeError where a field is missing or there is no such field."""
        if values.keys() != self._known:
            raise TypeError(f"fields are missing, or unknown: {sorted(values.keys() ^ self._known)}")
        return self._in_order(values)


class BlockFields(Fields):
    """A block (m, n), int64: sizes, strides in elements, and addresses, 0 for a tensor that there is not.

    What changes from step to step is told apart from the rows, in a table of addresses (``host/tables/step_table.py``):
    fields marked * hold where in that table the address is.

    Our own matrices have leading dimensions that are multiples of 16 elements and zeros in the padding, which is why
    they are read and written up to it: whole vectors of 16 bytes.
    """

    # sizes; MP, NP: m, n rounded up to 16
    M: int
    N: int
    MP: int
    NP: int
    TERMS: int  # of a SumKron; 1
    # our own matrices
    S: int  # (terms, n, np)
    P: int  # (m, terms·mp)
    XT: int  # (n, terms·mp): (Q's first product)ᵀ
    OUT: int  # *: (m, np): Q's second product
    POLAR: int  # (m, np): nat's polar factor; 0: nat is left as it is
    POLAR_T: int  # (n, mp): its transpose
    # matrices that others laid out, each with its leading dimension
    A: int  # outer diagonal A, or d of a Diagonal
    LDA: int
    X: int  # *: momentum; F v in a λ step
    LDX: int
    X_COLS: int  # columns that may be read: with the padding where it is ours
    V: int  # *: v = Q u in a λ step
    LDV: int
    V_COLS: int  # columns that may be read: with the padding where it is ours
    # the gradient, where the parameters hold it: columns below COLS in one tensor, column COLS in another
    COLS: int
    GRAD: int  # *
    GRAD_COLS: int  # COLS, or 0 where that gradient is None
    GRAD_ROW: int  # stride of a row
    GRAD_INNER: int  # column c is at (c // inner)·outer stride + (c % inner)·inner stride
    GRAD_OUTER: int
    GRAD_STEP: int
    BIAS_GRAD: int  # *
    BIAS_GRAD_ROW: int
    SCALE: int  # *: a device scalar that multiplies the gradient
    # parameters; 0: it does not move
    WEIGHT: int
    WEIGHT_ROW: int
    WEIGHT_INNER: int
    WEIGHT_OUTER: int
    WEIGHT_STEP: int
    BIAS: int
    BIAS_ROW: int
    # scalars of the block
    STEP: int  # the step counter on the device; 0: the host's, told in the hyperparameters
    HYPER: int  # *: the hyperparameters of a θ step
    ENTRIES: int  # of a θ step's nat, by which its length is set: m·n; max(m, n) of a polar factor
    LR: int  # lr on the device, weight's and bias's; 0: in the hyperparameters
    BIAS_LR: int
    SLOT: int  # the block's partial sums: the first, and how many
    SLOTS: int
    INDEX: int  # the block's number
    FIRST: int  # 1 in one row of each block: the one that writes the block's scalars
    DIAGONAL: int  # 1: Q u = d²∘u, computed where it is used
    # scratch of a λ step
    U: int  # (m, np): u
    UT: int  # (n, mp): uᵀ
    WS: int  # (terms, m, np): w S
    # Adam's moments of a Diagonal's d, laid out as d
    AVG: int
    AVG_SQ: int


class HyperFields(Fields):
    """The hyperparameters of a θ step, float32; blocks of one parameter group that were stepped as often share them."""

    KEEP: int  # m̂ = keep·m + take·g before the bias correction
    TAKE: int
    RATE: int  # m ← m + rate·(g − m)
    CORRECTION: int  # 1 − β^(t + times), where the host counts
    LOG2_BETA: int
    TIMES: int
    LR: int
    DECAY: int
    BIAS_LR: int
    BIAS_DECAY: int
    BASE_LR_SQUARED: int  # lr₀²
    RMS: int  # root-mean-square of a step by "rms" and "spectral", over lr


class FactorFields(Fields):
    """One of λ's factors (k, k), int64: F = L as it is, or F = Rᵀ.

    Both have the same formulas: S = F Fᵀ (P for R), ∂F = (M + Mᵀ) F, with M = uᵀPw for L and M = wSuᵀ for R.
    """

    SIZE: int  # k
    PADDED: int  # k rounded up to 16: the leading dimension of our own matrices
    AUX: int  # L or R as λ holds it
    LD_AUX: int
    AVG: int  # Adam's moments, laid out as λ
    AVG_SQ: int
    LEFT: int  # (k, depth): M = left rightᵀ; contiguous
    RIGHT: int
    DEPTH: int
    SYM: int  # (k, k padded): M + Mᵀ
    NEW: int  # F after Adam's step
    GRAD: int  # ∂F
    SQUARE: int  # F Fᵀ: S or P; a DiagKron's copy of F
    LD_SQUARE: int
    TRANSPOSED: int  # 1: F is the transpose of what λ holds
    SLOT: int  # partial sums: the first, and how many
    SLOTS: int
    INDEX: int  # where their sum goes
    STEP: int  # Adam's counter on the device; 0: the host counts
    FIRST: int  # 1 in one row of each block
    LD_RIGHT: int


class PolarFields(Fields):
    """A matrix X (short, long) on its way to its polar factor, int64: nat/‖nat‖, or its transpose where nat is tall."""

    SHORT: int
    LONG: int
    SHORT_PADDED: int  # rounded up to 16: leading dimensions
    LONG_PADDED: int
    X: int  # (short, long padded)
    XT: int  # (long, short padded): its transpose
    NEXT_XT: int  # where the transpose of the next X goes
    A: int  # (short, short padded): X Xᵀ
    B: int  # as A: A², or bA + cA²
    SLOT: int  # partial sums of ‖A²‖²: the first, and how many
    SLOTS: int


class PairFields(Fields):
    """Two tensors whose inner product is computed, int64."""

    X: int
    Y: int
    ELEMENTS: int


F = BlockFields()
H = HyperFields()
K = FactorFields()
POLAR = PolarFields()
PAIR = PairFields()
