"""Blocks as an optimizer hands them to an op, and what a step reads and writes of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fishleg_fast.algebra.structures.base import Structure
from fishleg_fast.algebra.structures.diagkron import DiagKron
from fishleg_fast.algebra.structures.diagonal import Diagonal
from fishleg_fast.algebra.structures.kron import Kron
from fishleg_fast.model.block import Block, Part
from support.dense import randn, randomise


def make_block(structure: Structure, params: list[Tensor], axis: int = 1, seed: int = 0, **group: object) -> Block:
    """A block of ``params`` side by side, with random λ, as the optimizer hands it to an op."""
    randomise(structure, seed)
    with torch.no_grad():
        for t in structure.fishleg_aux.values():
            t.mul_(0.7)
    block = Block("block", [Part(nn.Parameter(p)) for p in params], axis, structure)
    block.allocate(on_device=False)
    options = {"lr": 0.1, "beta": 0.9, "weight_decay": 0.0, "maximize": False, "base_lr": 0.1, **group}
    block.groups = [options for _ in params]
    block.grads = list(params)
    return block


def make_blocks(dtype: torch.dtype = torch.float64, **group: object) -> list[Block]:
    """A layer with a bias (3, 4+1), a matrix (2, 3) and a norm's weight and bias, 2·4, below each other."""
    options = {"dtype": dtype}
    return [
        make_block(Kron(3, 5, **options), [randn(3, 4, dtype=dtype), randn(3, seed=1, dtype=dtype)], **group),
        make_block(DiagKron(2, 3, **options), [randn(2, 3, seed=2, dtype=dtype)], seed=1, **group),
        make_block(
            Diagonal((8, 1), **options), [randn(4, seed=3, dtype=dtype), randn(4, seed=4, dtype=dtype)], 0, 2, **group
        ),
    ]


def gradients(blocks: list[Block], step: int) -> list[Tensor]:
    return [randn(*b.shape, seed=100 * step + i, dtype=b.dtype) for i, b in enumerate(blocks)]


def theta(block: Block) -> Tensor:
    """The block's matrix, read off its parameters without the block's own methods."""
    values = [p.param.detach() for p in block.parts]
    if block.axis == 0:
        return torch.cat([v.reshape(-1, 1) for v in values])
    return torch.cat([v.reshape(v.shape[0], -1) for v in values], dim=1)


def everything(blocks: list[Block]) -> list[Tensor]:
    """All that a step may write to."""
    tensors = []
    for b in blocks:
        tensors += [p.param.detach() for p in b.parts] + [b.momentum, b.step, b.aux_step]
        tensors += [*b.structure.fishleg_aux.values(), *b.exp_avg.values(), *b.exp_avg_sq.values()]
    return [t.clone() for t in tensors]


def assert_same(before: list[Tensor], blocks: list[Block]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(before, everything(blocks), strict=True))


def fisher_products(blocks: list[Block]) -> list[Tensor]:
    """A positive semi-definite F over all blocks together, coupling them: one dense matrix."""
    size = sum(math.prod(b.shape) for b in blocks)
    x = randn(size, size, seed=7, dtype=torch.float64)
    return x @ x.T / size


def split(vector: Tensor, blocks: list[Block]) -> list[Tensor]:
    pieces = vector.split([math.prod(b.shape) for b in blocks])
    return [p.reshape(b.shape) for p, b in zip(pieces, blocks, strict=True)]
