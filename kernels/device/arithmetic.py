"""Arithmetic that kernels share: products of tiles, sums of partial sums in fixed order, Adam's formulas."""

from __future__ import annotations

import triton
import triton.language as tl


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
def last_to_arrive(arrived, index, count):
    """Whether this program is the last of ``count`` at a counter, which is 0 again after it.

    What all of them wrote before is then there to be read.
    """
    tl.debug_barrier()  # this program's own writes come before it counts
    last = tl.atomic_add(arrived + index, 1, sem="acq_rel") == count - 1
    tl.store(arrived + index, 0, mask=last)
    return last


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
def one_minus_power(log2_beta, t):
    """1 − β^t, whose leading digits cancel in float32 where β is near 1."""
    return (1 - tl.exp2((log2_beta * t).to(tl.float64))).to(tl.float32)


@triton.jit
def first_moment(avg, g, beta1):
    """Adam's moving average of the gradient, with g."""
    return avg + (1 - beta1) * (g - avg)


@triton.jit
def second_moment(avg_sq, g, beta2):
    """The same of its square."""
    return beta2 * avg_sq + (1 - beta2) * g * g


@triton.jit
def adam(old, avg, avg_sq, correction1, correction2, lr, eps):
    """Adam's step with the new moments, as torch.optim.Adam's: eps outside the root."""
    return old - lr / correction1 * avg / (tl.sqrt(avg_sq) / tl.sqrt(correction2) + eps)
