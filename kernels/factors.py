"""Rows that describe λ's factors to the kernels: one a factor (k, k), L as it is and R by its transpose.

With F = L or F = Rᵀ both have the same formulas: S = F Fᵀ (P for R), ∂F = (M + Mᵀ) F, with M = uᵀPw for L and
N = wSuᵀ for R.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shared import address, leading
from .table import padded, upload

K_SIZE = tl.constexpr(0)  # k
K_PADDED = tl.constexpr(1)  # the same rounded up to 16: the leading dimension of our own matrices
K_LAMBDA = tl.constexpr(2)  # L or R as λ holds it
K_LD = tl.constexpr(3)
K_AVG = tl.constexpr(4)  # Adam's moments, laid out as λ
K_AVG_SQ = tl.constexpr(5)
K_LEFT = tl.constexpr(6)  # (k, depth): M = left rightᵀ; contiguous
K_RIGHT = tl.constexpr(7)
K_DEPTH = tl.constexpr(8)
K_SYM = tl.constexpr(9)  # (k, k padded): M + Mᵀ
K_NEW = tl.constexpr(10)  # F after Adam's step
K_GRAD = tl.constexpr(11)  # ∂F
K_SQUARE = tl.constexpr(12)  # F Fᵀ: S or P
K_LDSQUARE = tl.constexpr(13)
K_TRANSPOSED = tl.constexpr(14)  # 1: F is the transpose of what λ holds
K_SLOT = tl.constexpr(15)  # first partial sum
K_STEP = tl.constexpr(16)  # Adam's counter on the device; 0: the host counts
K_INDEX = tl.constexpr(17)  # the block's number
K_FIRST = tl.constexpr(18)  # 1 in one row of each block
K_LDRIGHT = tl.constexpr(19)
FACTOR_FIELDS = tl.constexpr(20)


@triton.jit
def factor_tile(row, r, c, k, TRANSPOSED: tl.constexpr, ALIGN: tl.constexpr):
    """F at rows r and columns c, of shapes that broadcast."""
    start = address(row, K_LAMBDA, tl.float32, ALIGN)
    ld = leading(row, K_LD, ALIGN)
    if TRANSPOSED:
        at = start + c * ld + r
    else:
        at = start + r * ld + c
    return tl.load(at, mask=(r < k) & (c < k), other=0)


@dataclass
class Factors:
    """Rows of factors."""

    align: int = 16
    ints: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sizes)

    def device(self, device: torch.device) -> Tensor:
        return upload(tuple(self.ints), torch.int64, device)

    def add(
        self,
        aux: Tensor,  # (k, k)
        square: Tensor,
        transposed: bool,
        *,
        moments: tuple[Tensor, Tensor] | None = None,
        operands: tuple[Tensor, Tensor] | None = None,
        sym: Tensor | None = None,
        new: Tensor | None = None,
        grad: Tensor | None = None,
        slot: int = 0,
        step: Tensor | None = None,
        index: int = 0,
        first: bool = False,
    ) -> None:
        """One row."""
        k = aux.shape[0]
        if aux.stride(1) != 1 and k > 1:
            raise ValueError(f"λ should be row-major but has strides: {aux.stride()}; assign with copy_()")
        self.align = next(a for a in (16, 4, 1) if self.align % a == aux.stride(0) % a == k % a == 0)
        self.align = self.align if aux.data_ptr() % 16 == 0 else 1
        at = lambda t: 0 if t is None else t.data_ptr()
        left, right = operands or (None, None)
        avg, avg_sq = moments or (None, None)
        ints = [k, padded(k), aux.data_ptr(), aux.stride(0), at(avg), at(avg_sq), at(left), at(right)]
        ints += [0 if left is None else left.stride(0), at(sym), at(new), at(grad), square.data_ptr()]
        ints += [
            square.stride(0),
            int(transposed),
            slot,
            at(step),
            index,
            int(first),
            0 if right is None else right.stride(0),
        ]
        assert len(ints) == FACTOR_FIELDS.value
        self.ints += ints
        self.sizes.append(k)
