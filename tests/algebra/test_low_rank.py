"""What is computed of a low-rank EᵀH is what is computed of the dense matrix, and cheaper where it is chosen."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fishleg_fast import Kron, SumKron, precision
from fishleg_fast.algebra.costs import count_applications, forming_pays, low_rank_pays, outer_products_pay
from fishleg_fast.algebra.low_rank import DenseAndLowRank, LowRankProduct
from fishleg_fast.algebra.matrix import dot, is_zero
from fishleg_fast.backends import reference as steps
from support.dense import dense_q, randn, randomise, relative
from support.low_rank import FORMED, low_rank_matrix

EXACT = 1e-10
MAKERS = {"kron": Kron, "sumkron2": SumKron, "sumkron3": partial(SumKron, terms=3)}
LAYOUTS = {
    "dense": {},
    "R-diagonal": {"diagonal": ("R",)},
    "L-diagonal": {"diagonal": ("L",)},
    "both-diagonal": {"diagonal": ("R", "L")},
    "blocks": {"max_factor_size": 4},  # 11 -> 3 of 4, padded; 13 -> 4 of 4
    "L-dense": {"max_factor_size": 5},
    "R-diagonal-blocks": {"diagonal": ("R",), "max_factor_size": 4},
}
SHAPES = [(1, 1), (1, 7), (7, 1), (9, 5), (11, 13)]

bfloat16 = pytest.mark.skipif(not precision._fast_bfloat16(), reason="the CPU has no bfloat16 products")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MAKERS)
def test_products_and_gradients_match_the_dense_matrix(kind: str, layout: str, shape: tuple[int, int]) -> None:
    """Whichever of P and S are formed, for ranks below and above the sizes, and w with low-rank terms or without."""
    structure = MAKERS[kind](*shape, **LAYOUTS[layout], dtype=torch.float64)
    randomise(structure, seed=1)
    Q = dense_q(structure, structure.fishleg_aux)
    leaves = {name: t.clone().requires_grad_() for name, t in structure.fishleg_aux.items()}
    for rank, terms in [(1, 1), (1, 2), (3, 1), (20, 2)]:  # w without a dense matrix, for rank 3
        u = low_rank_matrix(rank, shape, seed=2)
        extra = tuple(low_rank_matrix(2 + k, shape, seed=5 + 2 * k) for k in range(terms))
        dense = [randn(*shape, seed=4)] if rank != 3 else []
        w = DenseAndLowRank.of(*dense, *extra)
        U, W = u.E.T @ u.H, sum(dense, sum(t.E.T @ t.H for t in extra))
        Qu = (Q @ U.reshape(-1)).reshape(shape)
        s = W.reshape(-1) @ dense_q(structure, leaves) @ U.reshape(-1)
        want = dict(zip(leaves, torch.autograd.grad(s, list(leaves.values())), strict=True))
        for formed, uses in FORMED.items():
            next(iter(structure.fishleg_aux.values())).mul_(1)  # λ was written to: nothing is formed
            structure.refresh(uses)
            names = {name[0] for name in structure.cache}
            whole = {p for p, name in zip("PS", list(leaves)[:2], strict=True) if leaves[name].ndim > 1}
            assert names & whole == {"both": whole, "neither": set()}.get(formed, {formed} & whole)
            image = structure.low_rank_product(u)
            assert isinstance(image, LowRankProduct) and relative(image.E.T @ image.H, Qu) <= EXACT
            assert relative(structure.product(U), Qu) <= EXACT
            found = [structure.low_rank_gradients(u, image, w), structure.gradients(U, W)]
            found.append(structure.low_rank_gradients(u, LowRankProduct(image.E, image.H), w))  # without the halves
            for got, name in itertools.product(found, want):
                assert relative(got[name], want[name]) <= EXACT, (formed, rank, terms, name)
    assert (
        layout != "dense" or shape[1] < 13 or outer_products_pay(got[name], 1) > outer_products_pay(got[name], 20)
    )  # both were met


def test_a_cache_made_in_inference_mode_does_not_stand_in_the_way() -> None:
    structure, u = Kron(6, 4, dtype=torch.float64), randn(6, 4)
    with torch.inference_mode():
        structure.Qv(u)
    structure.fishleg_aux["R"].mul_(2)
    assert relative(structure.Qv(u), 4 * u) <= EXACT


def test_algebra() -> None:
    shape = (5, 7)
    x, y = low_rank_matrix(3, shape), low_rank_matrix(9, shape, seed=2)
    a, b = randn(*shape, seed=4), randn(*shape, seed=5)
    X, Y = x.E.T @ x.H, y.E.T @ y.H
    assert x.shape == shape and x.rank == 3
    assert relative(x.dense, X) <= EXACT and relative(x.scaled(-2).dense, -2 * X) <= EXACT
    pairs = [(x, X, y, Y), (x, X, b, b), (a, a, y, Y), (a, a, b, b), (x, X, x, X), (a, a, a, a)]
    for p, P, q, R in pairs:
        assert relative(dot(p, q), (P * R).sum()) <= EXACT
    want = sum((P * R).sum() for _, P, _, R in pairs)
    assert relative(steps.inner([p for p, *_ in pairs], [q for *_, q, _ in pairs]), want) <= EXACT
    assert relative(steps.inner([a.float(), x], [b.float(), y]), (a * b).sum() + (X * Y).sum()) <= 1e-6
    for terms, whole in [((x,), X), ((a, x), a + X), ((x, a, y), a + X + Y)]:
        w, left, right = DenseAndLowRank.of(*terms), randn(4, 5, seed=6), randn(4, 7, seed=7)
        assert relative(w.left(left), left @ whole) <= EXACT and relative(w.right(right), right @ whole.T) <= EXACT
        assert w.to(torch.float32).left(left.float()).dtype == torch.float32
        assert (w.dense_term is a) == any(t is a for t in terms)
    out = torch.full(shape, float("nan"), dtype=torch.float64)
    x.to(torch.float32).into(out)
    assert relative(out, X) <= 1e-6
    for value, zero in {1.0: 0, -1.0: 0, -0.0: 1, float("nan"): 0, float("-inf"): 0, 5e-324: 0}.items():
        z = torch.zeros(3, 4, dtype=torch.float64)
        z[1, 2] = value
        assert bool(is_zero(z)) == zero, value
    assert is_zero(torch.zeros(0, 3))


def applied(factor: Tensor, columns: int) -> int:
    """Multiply-adds of a factor with a matrix of so many columns, one scalar after another."""
    blocks, width = {1: (len(factor), 1), 2: (1, len(factor)), 3: (len(factor), factor.shape[-1])}[factor.ndim]
    return sum(columns for _ in range(blocks) for _ in range(width) for _ in range(width))


def counted(function: Callable[[], object]) -> int:
    """Multiply-adds of all matrix products in it."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_cheaper_route_is_taken(layout: str) -> None:
    decisions = set()
    for m, n, rank in itertools.product((1, 2, 6, 17), (1, 2, 6, 17), (1, 2, 3, 5, 8, 12, 30)):
        structure, U = Kron(m, n, **LAYOUTS[layout]), torch.ones(m, n)
        u = low_rank_matrix(rank, (m, n)).to(torch.float32)
        R, L = structure.fishleg_aux.values()
        low_rank, dense = applied(R, rank) + applied(L, rank) + m * n * rank, applied(R, n) + applied(L, m)
        assert low_rank_pays(R, L, m, n, rank) == (low_rank < dense)
        decisions.add(low_rank < dense)
        if "diagonal" not in layout and rank == 3:  # FlopCounterMode does not see elementwise products
            structure.refresh()
            assert counted(lambda: structure.low_rank_product(u).into(torch.empty(m, n))) == low_rank  # noqa: B023
            assert counted(lambda: structure.product(U)) == dense  # noqa: B023
        for factor, k in ((R, m), (L, n)):
            form, without = applied(factor, factor.shape[-1]), 2 * applied(factor, rank)
            assert forming_pays(factor, None) and forming_pays(factor, rank) == (
                factor.ndim == 1 or form + without // 2 <= without
            )
            square = rank * k * k
            assert outer_products_pay(factor, rank) == (factor.ndim == 2 and 4 * square < square + k**3)
        assert count_applications(u, 4, 2) == (4 * rank + 2 * n, 4 * rank + 2 * m) and count_applications(U, 4, 2) == (
            6 * n,
            6 * m,
        )
    assert decisions == {True, False} or "diagonal" in layout


@bfloat16
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MAKERS)
def test_medium_precision_is_that_of_bfloat16(kind: str, layout: str) -> None:
    shape = (33, 29)
    structure = MAKERS[kind](*shape, **LAYOUTS[layout], dtype=torch.float32)
    for k, t in enumerate(structure.fishleg_aux.values()):  # well-conditioned
        t.add_(0.1 * randn(*t.shape, seed=k).float() / t.shape[-1] ** 0.5)
    summed = DenseAndLowRank.of(randn(*shape, seed=9), low_rank_matrix(2, shape, seed=10))
    u, U, w = (x.to(torch.float32) for x in (low_rank_matrix(4, shape), randn(*shape, seed=8), summed))
    W = w.dense
    exact = [structure.low_rank_product(u).dense, structure.product(U)]
    exact += [*structure.gradients(u.dense, W).values(), *structure.gradients(U, W).values()]
    structure.operand_dtype = precision.operand_dtype("medium", torch.device("cpu"), torch.float32)
    for uses in FORMED.values():
        next(iter(structure.fishleg_aux.values())).mul_(1)
        structure.refresh(uses)
        got = [structure.low_rank_product(u).dense, structure.product(U)]
        got += [
            *structure.low_rank_gradients(u, structure.low_rank_product(u), w).values(),
            *structure.gradients(U, W).values(),
        ]
        for k, (x, y) in enumerate(zip(got, exact, strict=True)):
            assert 1e-5 < relative(x, y) < 2e-2, k
