"""Lists of blocks of all kinds for packed products, and their θ and λ steps in float64, by plain formulas."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fishleg_fast.algebra.low_rank import LowRank
from fishleg_fast.algebra.matrix import dense
from fishleg_fast.algebra.structures.diagkron import DiagKron
from fishleg_fast.algebra.structures.diagonal import Diagonal
from fishleg_fast.algebra.structures.kron import Kron
from fishleg_fast.algebra.structures.sumkron import SumKron
from fishleg_fast.backends.cpu import packed_matrix, packed_products
from fishleg_fast.model.block import Block
from support.blocks import make_block, theta
from support.dense import dense_q, randn, relative


def needs(engine: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        engine not in packed_matrix.engines(), reason=f"this processor, or this build, has no {engine}"
    )


EACH = pytest.mark.parametrize(
    "operands", [pytest.param(t, marks=needs(engine), id=str(t)[6:]) for t, engine in packed_matrix.ENGINES.items()]
)


class Errors(NamedTuple):
    """Relative errors allowed, and ``least``: that of products of large blocks, which are rounded indeed."""

    product: float
    step: float
    gradient: float
    least: float


ERRORS = {
    torch.bfloat16: Errors(8e-3, 1e-2, 1e-2, 1e-3),  # a bfloat16 number has one of up to 4e-3
    torch.float32: Errors(1e-6, 1e-5, 1e-6, 1e-8),  # ... a float32 number of 6e-8
}

SHAPES = [(1, 1), (1, 33), (7, 5), (33, 31), (64, 100), (130, 257)]
OTHERS: list[Callable] = [  # between the packed ones
    SumKron,
    partial(Kron, scale=True),
    partial(Kron, diagonal=("L",)),
    partial(Kron, max_factor_size=4),
    DiagKron,
    lambda m, n, **o: Diagonal((m, n), **o),
]


def block_of(make: Callable, m: int, n: int, seed: int, dtype=torch.float32, operands=torch.bfloat16, **group) -> Block:
    """A weight, and a bias where there are two columns; a well-conditioned λ."""
    columns = [(m, n - 1), (m,)] if n > 1 else [(m, n)]
    params = [0.3 * randn(*shape, seed=seed + k, dtype=dtype) for k, shape in enumerate(columns)]
    block = make_block(make(m, n, dtype=dtype), params, seed=seed, **{"lr": 0.05, "base_lr": 0.05, **group})
    for name, t in block.structure.fishleg_aux.items():
        matrix = t.ndim > 1 and name[0] in "RL"
        t.mul_(0.5 / t.shape[-1] ** 0.5 if matrix else 0.2)
        (t.diagonal(dim1=-2, dim2=-1) if matrix else t).add_(1)
    block.structure.operand_dtype = operands
    return block


def mixed(operands: torch.dtype, **group: object) -> list[Block]:
    """All shapes, with a block of another kind after each of them."""
    ours = [block_of(Kron, m, n, 10 * k, operands=operands, **group) for k, (m, n) in enumerate(SHAPES)]
    assert all(map(packed_products.covers, ours))
    rest = [block_of(f, 9, 6, 7 * k, operands=operands, **group) for k, f in enumerate(OTHERS)]
    rest.append(block_of(Kron, 9, 7, 1, dtype=torch.float64, operands=torch.float64, **group))
    assert not any(map(packed_products.covers, rest))
    return [b for pair in itertools.zip_longest(ours, rest) for b in pair if b is not None]


def directions(blocks: list[Block], rank: int, seed: int, low_rank: bool = True) -> list[LowRank | Tensor]:
    """Low-rank ones where Q keeps them so. An entry has one sign for all seeds, so that sums of them do not cancel."""
    found: list[LowRank | Tensor] = []
    for k, b in enumerate(blocks):
        signs = [randn(size, seed=k + 40 * i).sign() for i, size in enumerate(b.shape)]
        E, H = (randn(rank, len(s), seed=seed + 5 * k + i).abs() * s for i, s in enumerate(signs))
        u = LowRank((0.1 * E).to(b.dtype), H.to(b.dtype))
        found.append(u if low_rank and b.structure.keeps_low_rank else u.dense)
    return found


def curved(blocks: list[Block], kind: str) -> list[LowRank | Tensor]:
    """What F v may be, whatever v is."""
    return [t if kind == "low-rank F v" else dense(t) for t in directions(blocks, 40, seed=50)]


def whole(x: LowRank | Tensor) -> Tensor:
    """(m, n) in float64."""
    return x.E.double().T @ x.H.double() if isinstance(x, LowRank) else x.double()


def exact_q(block: Block, u: Tensor, aux: dict[str, Tensor] | None = None) -> Tensor:
    """Q u in float64, of today's λ or of ``aux``. Differentiable."""
    aux = aux or {name: t.double() for name, t in block.structure.fishleg_aux.items()}
    if type(block.structure) is Kron and u.numel() > 100:
        R, L = aux["R"], aux["L"]
        return R.T @ (R @ u.double() @ L) @ L.T
    return (dense_q(block.structure, aux) @ u.double().reshape(-1)).reshape(u.shape)


@cache
def torch_sums_otherwise() -> bool:
    """Whether torch's float32 products depend on the number of threads, as those of MKL do on other makers' processors.

    They then also round less than one sum from end to end does, which is what ours, and MKL's elsewhere, are.
    """
    x, y, found, before = randn(7, 7).float(), randn(7, 33, seed=1).float(), [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(x @ y)
    finally:
        torch.set_num_threads(before)
    return not torch.equal(*found)


def assert_errors(ours: list[float], theirs: list[float], sizes: list[int], tolerance: float) -> None:
    """Within a tolerance and, where luck averages out, about as large as the reference's at the same precision."""
    alike = 3.0 if torch_sums_otherwise() else 1.3
    for k, (error, reference, size) in enumerate(zip(ours, theirs, sizes, strict=True)):
        limit = min(tolerance, alike * reference + tolerance / 10) if size > 500 else 2 * tolerance
        assert error <= limit, (k, error, reference, size)


def assert_close(got: list[Tensor], want: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    errors = [[relative(x, y) for x, y in zip(xs, want, strict=True)] for xs in (got, theirs)]
    assert_errors(*errors, [t.numel() for t in want], tolerance)


def placed(blocks: list[Block], gs: list[LowRank | Tensor]) -> list[LowRank | Tensor]:
    """The same gradients, in ``block.grads`` too."""
    for b, g in zip(blocks, gs, strict=True):
        b.grads = b.split(dense(g))
    return gs


class Exact:
    """θ steps of blocks in float64; λ is theirs."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks, self.count = blocks, 0
        self.thetas = [theta(b).double() for b in blocks]
        self.averages = [torch.zeros_like(t) for t in self.thetas]

    def step(self, gs: list[Tensor], momentum: str, nesterov: bool, normalize: str | None, kappa: float = 1e-2) -> None:
        self.count += 1
        nats, length = [], 0.0
        for k, (b, g) in enumerate(zip(self.blocks, gs, strict=True)):
            x = g if momentum == "before" else exact_q(b, g)
            self.averages[k] = b.beta * self.averages[k] + (1 - b.beta) * x
            ahead = b.beta * self.averages[k] + (1 - b.beta) * x if nesterov else self.averages[k]
            ahead = ahead / (1 - b.beta ** (self.count + nesterov))
            nats.append(exact_q(b, ahead) if momentum == "before" else ahead)
            length += float(((ahead if momentum == "before" else g) * nats[-1]).sum()) * b.groups[0]["base_lr"] ** 2
        for k, (b, g, nat) in enumerate(zip(self.blocks, gs, nats, strict=True)):
            c = min(1.0, (kappa / length) ** 0.5) if normalize == "trust" else 1.0
            if normalize == "rms":
                c = 0.2 / float(nat.square().mean().sqrt()) if g.any() else 0.0
            lr, decay = b.groups[0]["lr"], b.groups[0]["weight_decay"]
            self.thetas[k] = self.thetas[k] - lr * (c * nat + decay * self.thetas[k])


def exact_gradients(
    blocks: list[Block], us: list[Tensor], fvs: list[Tensor], damping: float, precondition: bool, learn_scale: bool
) -> tuple[tuple[float, float], list[tuple[Tensor, float]]]:
    """𝒜, and ∂⟨w, Q u⟩/∂λ in float64 by autograd, each with the size of its two terms, which may cancel.

    w = α(F+γI)v − u, or Q w, is constant; F v is given.
    """
    vs = [exact_q(b, u) for b, u in zip(blocks, us, strict=True)]
    power = sum(float((u * v).sum()) for u, v in zip(us, vs, strict=True))
    curved = [fv + damping * v for fv, v in zip(fvs, vs, strict=True)]
    vFv = sum(float((v * c).sum()) for v, c in zip(vs, curved, strict=True))
    alpha = 1.0 if learn_scale else power / vFv
    found = []
    for b, u, c in zip(blocks, us, curved, strict=True):
        leaves = {name: t.double().requires_grad_() for name, t in b.structure.fishleg_aux.items()}
        terms = [exact_q(b, w) if precondition else w for w in (alpha * c, -u)]
        with torch.enable_grad():
            Qu = exact_q(b, u, leaves)
        grads = [torch.autograd.grad(Qu, list(leaves.values()), w, retain_graph=True) for w in terms]
        found += [(x + y, float(x.norm() + y.norm())) for x, y in zip(*grads, strict=True)]
    return (0.5 * vFv - power, 0.5 * vFv + power), found
