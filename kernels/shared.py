"""What the kernels share: the fields of a block's row, tiles read through them, and sums of partial sums.

A row is FIELDS int64: sizes, leading dimensions and addresses of one block (m, n), written by ``table.py``. Our own
matrices have leading dimensions that are multiples of 16 elements and zeros in the padding, which is why they are read
and written up to it: whole vectors of 16 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

# sizes: mp, np are m, n rounded up to 16
F_M = tl.constexpr(0)
F_N = tl.constexpr(1)
F_MP = tl.constexpr(2)
F_NP = tl.constexpr(3)
F_TERMS = tl.constexpr(4)  # of a SumKron
# own matrices
F_S = tl.constexpr(5)  # (terms, n, np)
F_P = tl.constexpr(6)  # (m, terms·mp)
F_XT = tl.constexpr(7)  # (n, terms·mp): (Q's first product)ᵀ
F_OUT = tl.constexpr(8)  # (m, np): Q's second product
# matrices that others laid out
F_A = tl.constexpr(9)  # outer diagonal A, or d of a Diagonal; 0: none
F_LDA = tl.constexpr(10)
F_X = tl.constexpr(11)  # momentum; F v in a λ step
F_LDX = tl.constexpr(12)
F_XCOLS = tl.constexpr(13)  # columns that may be read: with the padding where it is ours
F_V = tl.constexpr(14)  # v = Q u in a λ step
F_LDV = tl.constexpr(15)
# the gradient, where the parameters hold it: columns below F_COLS in one tensor, column F_COLS in another
F_COLS = tl.constexpr(16)
F_G = tl.constexpr(17)
F_GCOLS = tl.constexpr(18)  # F_COLS, or 0 where that gradient is None
F_GROW = tl.constexpr(19)  # stride of a row
F_GINNER = tl.constexpr(20)  # column c is at (c // inner)·outer stride + (c % inner)·inner stride
F_GOUTER = tl.constexpr(21)
F_GSTEP = tl.constexpr(22)
F_GB = tl.constexpr(23)  # the bias's; 0: None
F_GBROW = tl.constexpr(24)
F_SCALE = tl.constexpr(25)  # of a device scalar that multiplies the gradient; 0: none
# parameters
F_W = tl.constexpr(26)  # 0: it does not move
F_WROW = tl.constexpr(27)
F_WINNER = tl.constexpr(28)
F_WOUTER = tl.constexpr(29)
F_WSTEP = tl.constexpr(30)
F_WB = tl.constexpr(31)
F_WBROW = tl.constexpr(32)
# per block
F_STEP = tl.constexpr(33)  # of the step counter on the device; 0: the host's, told in the hyperparameters
F_LR = tl.constexpr(34)  # of lr on the device, weight's and bias's; 0: in the hyperparameters
F_LRB = tl.constexpr(35)
F_SLOT = tl.constexpr(36)  # the block's partial sums
F_SLOTS = tl.constexpr(37)
F_INDEX = tl.constexpr(38)  # the block's number
F_FIRST = tl.constexpr(39)  # 1 in one row of each block: the one that writes the block's scalars
F_DIAGONAL = tl.constexpr(40)  # 1: Q u = d²∘u, computed where it is used
# scratch of a λ step
F_U = tl.constexpr(41)  # (m, np): u
F_UT = tl.constexpr(42)  # (n, mp): uᵀ
F_WS = tl.constexpr(43)  # (terms, m, np): w S
FIELDS = tl.constexpr(44)

# hyperparameters of a block, float32
H_KEEP = tl.constexpr(0)  # m̂ = keep·m + take·g before the bias correction
H_TAKE = tl.constexpr(1)
H_RATE = tl.constexpr(2)  # m ← m + rate·(g − m)
H_CORRECTION = tl.constexpr(3)  # 1 − β^(t + times), where the host counts
H_LOG2BETA = tl.constexpr(4)
H_TIMES = tl.constexpr(5)
H_LR = tl.constexpr(6)
H_DECAY = tl.constexpr(7)
H_LRB = tl.constexpr(8)
H_DECAYB = tl.constexpr(9)
H_BASE = tl.constexpr(10)  # lr₀²
H_SIZE = tl.constexpr(11)  # 0.2·√(mn)
HYPERS = tl.constexpr(12)


@triton.jit
def field(row, F: tl.constexpr):
    return tl.load(row + F)


@triton.jit
def leading(row, F: tl.constexpr, ALIGN: tl.constexpr):
    """A size or stride that is a multiple of ALIGN elements."""
    return tl.multiple_of(tl.load(row + F), ALIGN)


@triton.jit
def address(row, F: tl.constexpr, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """A pointer, to 16 bytes where ALIGN > 1."""
    pointer = tl.load(row + F).to(tl.pointer_type(DTYPE))
    if ALIGN > 1:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def gradient(row, r, c, inside, G: tl.constexpr, GENERAL: tl.constexpr, ALIGN: tl.constexpr):
    """The gradient at rows r and columns c, int32 of shapes that broadcast; ``inside``: of r. float32."""
    cols = leading(row, F_GCOLS, ALIGN)
    start = address(row, F_G, G, ALIGN) + r * leading(row, F_GROW, ALIGN)
    if GENERAL:
        inner = field(row, F_GINNER).to(tl.int32)
        at = start + (c // inner) * field(row, F_GOUTER) + (c % inner) * field(row, F_GSTEP)
    else:
        at = start + c
    g = tl.load(at, mask=inside & (c < cols), other=0).to(tl.float32)
    bias = address(row, F_GB, G, 1)
    b = tl.load(bias + r * field(row, F_GBROW), mask=inside & (field(row, F_GB) != 0), other=0).to(tl.float32)
    return g + tl.where(c == field(row, F_COLS), b, 0)


@triton.jit
def parameter(row, r, c, GENERAL: tl.constexpr, W: tl.constexpr, ALIGN: tl.constexpr):
    """Pointers to the weight at rows r and columns c."""
    start = address(row, F_W, W, ALIGN) + r * leading(row, F_WROW, ALIGN)
    if GENERAL:
        inner = field(row, F_WINNER).to(tl.int32)
        at = start + (c // inner) * field(row, F_WOUTER) + (c % inner) * field(row, F_WSTEP)
    else:
        at = start + c
    return at


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a bᵀ for a (M, K), b (N, K), float32: the layout of operands that every tensor core takes as it is."""
    if PRECISION == "bf16":
        acc = tl.dot(a.to(tl.bfloat16), tl.trans(b.to(tl.bfloat16)), acc)
    else:
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    return acc


@triton.jit
def total(partials, count, CHUNK: tl.constexpr):
    """Sum of ``count`` partial sums, in the same order every time."""
    acc = tl.zeros([CHUNK], tl.float32)
    for start in range(0, count, CHUNK):
        at = start + tl.arange(0, CHUNK)
        acc += tl.load(partials + at, mask=at < count, other=0)
    return tl.sum(acc, 0)


@triton.jit
def finite(x):
    """Whether entries are neither infinite nor NaN."""
    return tl.abs(x) <= 3.4028234663852886e38


@triton.jit
def all_finite(partials, count, CHUNK: tl.constexpr):
    """Whether all partial sums are finite."""
    bad = tl.zeros([CHUNK], tl.int32)
    for start in range(0, count, CHUNK):
        at = start + tl.arange(0, CHUNK)
        p = tl.load(partials + at, mask=at < count, other=0)
        bad += tl.where(finite(p), 0, 1)
    return tl.sum(bad, 0) == 0


@triton.jit
def one_minus_power(log2beta, t):
    """1 − β^t, whose leading digits cancel in float32 where β is near 1."""
    return (1 - tl.exp2((log2beta * t).to(tl.float64))).to(tl.float32)


@triton.jit
def counter(row, F: tl.constexpr):
    """A step counter on the device, 0 where the host counts."""
    at = tl.load(row + F)
    return tl.load(at.to(tl.pointer_type(tl.float32)), mask=at != 0, other=0)


@triton.jit
def correction(row, hyper):
    """1 − β^(t + times)."""
    counted = one_minus_power(tl.load(hyper + H_LOG2BETA), counter(row, F_STEP) + tl.load(hyper + H_TIMES))
    return tl.where(tl.load(row + F_STEP) != 0, counted, tl.load(hyper + H_CORRECTION))


@triton.jit
def count(row, F: tl.constexpr, ok):
    """Raise a step counter where ``ok``, if the device counts."""
    at = tl.load(row + F)
    tl.store(at.to(tl.pointer_type(tl.float32)), counter(row, F) + 1, mask=(at != 0) & ok)


@triton.jit
def rate(row, hyper, F: tl.constexpr, H: tl.constexpr):
    """lr of the weight (F_LR, H_LR) or the bias."""
    given = tl.load(row + F)
    return tl.load(given.to(tl.pointer_type(tl.float32)), mask=given != 0, other=tl.load(hyper + H))
