"""Natural-gradient steps of λ, against float64 autograd through the dense average of the auxiliary loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fishleg_fast.algebra.natural import natural_step
from fishleg_fast.algebra.structures import stacked
from fishleg_fast.algebra.structures.base import Structure
from fishleg_fast.algebra.structures.diagkron import DiagKron
from fishleg_fast.algebra.structures.diagonal import Diagonal
from fishleg_fast.algebra.structures.kron import Kron
from support.dense import dense_q, full, laid_out, randn, randomise, relative

LAYOUTS = {
    "dense": {},
    "R-diagonal": {"diagonal": ("R",)},
    "both-diagonal": {"diagonal": ("R", "L")},
    "blocks-of-4": {"max_factor_size": 4},
    "R-diagonal-blocks": {"diagonal": ("R",), "max_factor_size": 3},
}
SHAPES = [(1, 1), (1, 6), (5, 3), (7, 9)]
GAMMA = 0.3


def moments_of(structure: Structure, rows: int = 40, seed: int = 0) -> dict[str, Tensor]:
    """Those of random inputs and output gradients, laid out as the structure's, with zero padding."""
    m, n = structure.shape
    e, a = randn(rows, m, seed=seed), randn(rows, n, seed=seed + 1)
    G, A = e.T @ e / rows, a.T @ a / rows
    like = list(structure.fishleg_aux.values())
    return {"rows": laid_out(G, like[0]), "columns": laid_out(A, like[1])}


def averaged_loss(structure: Structure, aux: dict[str, Tensor], F: Tensor, gamma: float) -> Tensor:
    """𝒜 of Q' = Q(``aux``), averaged over u ~ N(0, Q⁻¹): ½ tr(Q'(F+γI)Q'Q⁻¹) − tr(Q'Q⁻¹)."""
    covariance = torch.linalg.inv(dense_q(structure, structure.fishleg_aux))
    Q = dense_q(structure, aux)
    damped = F + gamma * torch.eye(F.shape[0], dtype=F.dtype)
    return 0.5 * (Q @ damped @ Q @ covariance).trace() - (Q @ covariance).trace()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_small_step_is_the_natural_gradient(layout: str, shape: tuple[int, int]) -> None:
    m, n = shape
    structure = Kron(m, n, dtype=torch.float64, **LAYOUTS[layout])
    randomise(structure, seed=3)
    moments, aux = moments_of(structure), structure.fishleg_aux
    F = torch.kron(full(moments["rows"], m), full(moments["columns"], n))
    eta = torch.tensor(1e-9, dtype=torch.float64)
    R, L = full(aux["R"], m), full(aux["L"], n)
    for name, factor, k, other in (("R", R, m, n), ("L", L.T, n, m)):
        leaf = aux[name].clone().requires_grad_()
        (grad,) = torch.autograd.grad(averaged_loss(structure, {**aux, name: leaf}, F, GAMMA), leaf)
        dense_grad = full(grad, k) if name == "R" else full(grad, k).T
        relative_grad = dense_grad @ factor.T  # in E, where the factor is (I+E) times itself
        E = laid_out(-(relative_grad + relative_grad.T) / 2 / (4 * other), aux[name])
        E = full(E, k)
        want = factor.T @ (E + E.T) @ factor  # the change of P, and of S
        own, others = (moments["rows"], moments["columns"])[:: 1 if name == "R" else -1]
        turned = [aux["R"], aux["L"] if aux["L"].ndim == 1 else aux["L"].mT]
        mine, beside = turned if name == "R" else turned[::-1]
        stepped, right = natural_step(mine, own, beside, others, (k, other), GAMMA, eta)
        moved = full(stepped, k)
        assert right
        assert relative((moved.T @ moved - factor.T @ factor) / eta, want) < 1e-4


def test_the_diagonal_s_small_step_is_the_natural_gradient() -> None:
    structure = Diagonal((3, 4), dtype=torch.float64)
    structure.fishleg_aux["d"].copy_(randn(3, 4, seed=3).abs() + 0.1)
    found = randn(3, 4, seed=5).square()
    leaf = structure.fishleg_aux["d"].clone().requires_grad_()
    (grad,) = torch.autograd.grad(averaged_loss(structure, {"d": leaf}, torch.diag(found.reshape(-1)), GAMMA), leaf)
    eta = torch.tensor(1e-9, dtype=torch.float64)
    stepped, right = structure.natural_update(structure.fishleg_aux, {"diagonal": found}, GAMMA, eta)
    d = structure.fishleg_aux["d"]
    # In e, where d is (1+e) times itself, the gradient is 2(d²(f+γ) − 1) and the curvature 4.
    assert right
    assert relative((stepped["d"] - d) / eta, -(grad * d / 4) * d) < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_whole_step_finds_the_inverse_of_a_kronecker_product_from_the_sgd_start(
    layout: str, shape: tuple[int, int]
) -> None:
    m, n = shape
    structure = Kron(m, n, dtype=torch.float64, **LAYOUTS[layout])
    structure.start_sgd(7.0)
    moments = moments_of(structure)
    F = torch.kron(full(moments["rows"], m), full(moments["columns"], n))
    none = 1e-14  # which padding needs
    for _ in range(2):  # and stays there
        structure.step_naturally(moments, none, torch.ones((), dtype=torch.float64))
        assert relative(structure.dense(), torch.linalg.inv(F)) < 1e-9
    structure.step_naturally(moments, none, torch.tensor(0.1, dtype=torch.float64))
    assert relative(structure.dense(), torch.linalg.inv(F)) < 1e-9


def test_damping_ends_where_the_averaged_loss_has_no_gradient() -> None:
    structure = Kron(4, 3, dtype=torch.float64)
    moments = moments_of(structure)
    for _ in range(200):
        structure.step_naturally(moments, GAMMA, torch.tensor(0.5, dtype=torch.float64))
    F = torch.kron(moments["rows"], moments["columns"])
    leaves = {name: t.clone().requires_grad_() for name, t in structure.fishleg_aux.items()}
    grads = torch.autograd.grad(averaged_loss(structure, leaves, F, GAMMA), list(leaves.values()))
    assert max(float(g.abs().max()) for g in grads) < 1e-9
    inverse = torch.linalg.inv(F + GAMMA * torch.eye(12, dtype=torch.float64))
    assert relative(structure.dense(), inverse) < 0.2  # the nearest Kronecker product


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e3, 1e12])
def test_q_stays_positive_definite_whatever_the_batch(scale: float) -> None:
    structure = Kron(9, 6, dtype=torch.float32)
    for step in range(30):
        rows = 2 if step % 2 else 40  # of less than full rank
        moments = {name: (t * scale**0.5).float() for name, t in moments_of(structure, rows, seed=step).items()}
        structure.step_naturally(moments, 0.01 * scale, torch.tensor(max(0.1, 1 / (step + 1))))
        values = torch.linalg.eigvalsh(structure.dense().double())
        assert torch.isfinite(values).all() and values.min() > 0, step
    R, L = structure.fishleg_aux.values()
    assert 0.5 < float(R.diagonal().norm() / 3 / (L.diagonal().norm() / 6**0.5)) < 2  # of one size


def test_a_moment_that_is_not_finite_is_refused_and_lambda_unchanged() -> None:
    structure = Kron(3, 2, dtype=torch.float64)
    randomise(structure)
    before = {name: t.clone() for name, t in structure.fishleg_aux.items()}
    moments = moments_of(structure)
    moments["rows"][0, 0] = torch.nan
    with pytest.raises(torch.linalg.LinAlgError, match="finite"):
        structure.step_naturally(moments, 0.1, torch.tensor(0.1, dtype=torch.float64))
    assert all(torch.equal(t, before[name]) for name, t in structure.fishleg_aux.items())


@pytest.mark.parametrize("kind", ["dense", "blocks-of-4", "R-diagonal", "diagonal"])
def test_equal_structures_together_are_each_by_itself(kind: str) -> None:
    def make(seed: int) -> tuple[Structure, dict[str, Tensor]]:
        if kind == "diagonal":
            structure: Structure = Diagonal((5, 3), dtype=torch.float64)
            structure.fishleg_aux["d"].copy_(randn(5, 3, seed=seed).abs() + 0.1)
            return structure, {"diagonal": randn(5, 3, seed=seed).square()}
        structure = Kron(5, 3, dtype=torch.float64, **LAYOUTS[kind])
        return structure, moments_of(structure, seed=seed)

    alone, jointly = ([make(seed) for seed in range(3)] for _ in range(2))
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    for (structure, moments), weight in zip(alone, weights, strict=True):
        structure.step_naturally(moments, GAMMA, torch.tensor(0.3, dtype=torch.float64), weight)
    right = stacked.step_naturally(
        [s for s, _ in jointly], [m for _, m in jointly], GAMMA, torch.full((3,), 0.3, dtype=torch.float64), weights
    )
    assert right.all()
    for (one, _), (other, _) in zip(alone, jointly, strict=True):
        for name, t in one.fishleg_aux.items():
            assert relative(other.fishleg_aux[name], t) < 1e-12


def test_structures_without_such_a_step_say_so() -> None:
    for structure in (Kron(3, 2, scale=True), DiagKron(3, 2)):
        with pytest.raises(NotImplementedError, match="Kron has no natural_update"):
            structure.step_naturally(structure.new_moments(), 0.1, torch.tensor(0.1))
