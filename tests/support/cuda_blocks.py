"""Blocks, and what else the tests of the CUDA backend share, on the CPU and on a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fishleg_fast.algebra.structures.diagkron import DiagKron
from fishleg_fast.algebra.structures.diagonal import Diagonal
from fishleg_fast.algebra.structures.kron import Kron
from fishleg_fast.algebra.structures.sumkron import SumKron
from fishleg_fast.model.block import Block
from fishleg_fast.model.gradients import GradientInPlace
from support.blocks import everything, make_block
from support.dense import randn, relative

# ‖error‖/‖float64's‖ of a product; tf32 has 10 bits of fraction, bf16 7.
TOLERANCE = {"ieee": 2e-6, "tf32x3": 3e-6, "tf32": 2e-3, "bf16": 2e-2}
SHAPES = [(1, 1), (3, 5), (63, 66), (257, 31), (5, 257)]  # the last two are too large for a chain


def shrunk(block: Block) -> Block:
    """λ of a size at which products neither grow nor vanish."""
    for name, t in block.structure.fishleg_aux.items():
        if name[0] in "RL":
            t.div_(max(t.shape[-1], 1) ** 0.5)
    return block


def layer(device: torch.device, m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32, **group: object):
    """A Kron block of a layer (m, n−1) with a bias, or of a weight alone where n is 1."""
    structure = Kron(m, n, dtype=torch.float32, device=device)
    sizes = [(m, n - 1), (m,)] if n > 1 else [(m, n)]
    params = [randn(*size, seed=seed + i, dtype=dtype).to(device) for i, size in enumerate(sizes)]
    return shrunk(make_block(structure, params, 1, seed, **group))


def model(device: torch.device, dtype: torch.dtype = torch.float32, **group: object) -> list[Block]:
    """Blocks of many shapes and layouts, transposed and channels-last among them; covered and uncovered."""
    options = {"dtype": torch.float32, "device": device}

    def new(structure, *params: Tensor, axis: int = 1, seed: int = 0) -> Block:
        return shrunk(make_block(structure, [p.to(device, dtype) for p in params], axis, seed, **group))

    convolution = randn(4, 3, 2, 3, seed=40).to(device, dtype).contiguous(memory_format=torch.channels_last)
    return [
        *(layer(device, m, n, i, dtype, **group) for i, (m, n) in enumerate(SHAPES)),
        new(Kron(9, 6, **options), randn(6, 9, seed=41).T, seed=1),
        new(Kron(4, 19, **options), convolution, randn(4, seed=42), seed=2),
        new(Kron(7, 11, scale=True, **options), randn(7, 11, seed=43), seed=3),
        new(Diagonal((5007, 1), **options), randn(5000, seed=44), randn(7, seed=45), axis=0, seed=4),
        new(Diagonal((257, 63), **options), randn(257, 63, seed=46), seed=5),
        new(DiagKron(5, 3, **options), randn(5, 3, seed=47), seed=6),
        new(SumKron(4, 6, **options), randn(4, 6, seed=48), seed=7),
        new(Kron(12, 10, max_factor_size=4, **options), randn(12, 10, seed=49), seed=8),
    ]


def set_gradients(blocks: Sequence[Block], step: int) -> list[GradientInPlace]:
    """Random gradients in ``block.grads``, laid out and typed as their parameters are."""
    for i, block in enumerate(blocks):
        grads: list[Tensor | None] = []
        for j, part in enumerate(block.parts):
            p = part.of(part.param)
            grad = torch.empty_like(p)  # keeps strides
            grad.copy_(randn(*p.shape, seed=1000 * step + 10 * i + j))
            grads.append(grad)
        block.grads = grads
    return [GradientInPlace(b) for b in blocks]


def assert_close(ours: list[Block], theirs: list[Block], tolerance: float) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        names = [f"{mine.shape} {i}" for i in range(len(everything([mine])))]
        for name, a, b in zip(names, everything([mine]), everything([other]), strict=True):
            wide = tolerance if a.dtype == torch.float32 else 4 * torch.finfo(a.dtype).eps
            assert relative(a.float(), b.float()) <= wide, name


def set_precision(blocks: list[Block], precision: str) -> None:
    for block in blocks:
        block.structure.precision = precision
