"""Every structure against the dense Kronecker matrix and float64 autograd through it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fishleg_fast.algebra.structures.base import Structure
from fishleg_fast.algebra.structures.diagkron import DiagKron
from fishleg_fast.algebra.structures.diagonal import Diagonal
from fishleg_fast.algebra.structures.kron import Kron
from fishleg_fast.algebra.structures.sumkron import SumKron
from support.dense import dense_q, full, laid_out, randn, randomise, relative

MAKERS = {
    "kron": lambda m, n, **o: Kron(m, n, **o),
    "kron-scale": lambda m, n, **o: Kron(m, n, scale=True, **o),
    "diagkron": lambda m, n, **o: DiagKron(m, n, **o),
    "sumkron1": lambda m, n, **o: SumKron(m, n, terms=1, **o),
    "sumkron2": lambda m, n, **o: SumKron(m, n, **o),
    "sumkron3": lambda m, n, **o: SumKron(m, n, terms=3, **o),
    "diagonal": lambda m, n, **o: Diagonal((m, n), dtype=o["dtype"]),
}
LAYOUTS = {
    "dense": {},
    "R-diagonal": {"diagonal": ("R",)},
    "L-diagonal": {"diagonal": ("L",)},
    "both-diagonal": {"diagonal": ("R", "L")},
    "blocks-of-4": {"max_factor_size": 4},  # 17 -> 5 blocks of 4, 33 -> 9 of 4, 5 -> 2 of 3: all padded
    "blocks-of-1": {"max_factor_size": 1},
    "R-diagonal-blocks": {"diagonal": ("R",), "max_factor_size": 11},  # 33 -> 3 of 11: not padded
}
SHAPES = [(1, 1), (1, 7), (7, 1), (5, 3), (17, 33), (0, 3), (3, 0)]
CASES = [
    pytest.param(kind, layout, shape, id=f"{kind}-{layout}-{shape[0]}x{shape[1]}")
    for kind in MAKERS
    for layout in LAYOUTS
    for shape in SHAPES
    if not (kind == "diagonal" and layout != "dense")
]


def make(kind: str, layout: str, shape: tuple[int, int], dtype: torch.dtype = torch.float64) -> Structure:
    return MAKERS[kind](*shape, **LAYOUTS[layout], dtype=dtype)


def autograd_grads(structure: Structure, u: torch.Tensor, w: torch.Tensor) -> dict[str, torch.Tensor]:
    """∂⟨w, Q(λ) u⟩/∂λ by float64 autograd through the test's own dense Q(λ)."""
    leaves = {name: t.double().clone().requires_grad_() for name, t in structure.fishleg_aux.items()}
    s = w.double().reshape(-1) @ dense_q(structure, leaves) @ u.double().reshape(-1)
    grads = torch.autograd.grad(s, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize(("kind", "layout", "shape"), CASES)
def test_products_and_gradients_match_the_dense_matrix(kind: str, layout: str, shape: tuple[int, int]) -> None:
    structure = make(kind, layout, shape)
    randomise(structure, seed=1)
    u, w = randn(*shape, seed=2), randn(*shape, seed=3)
    Q = dense_q(structure, structure.fishleg_aux)
    assert relative(structure.Qv(u), (Q @ u.reshape(-1)).reshape(shape)) <= 1e-12
    assert relative(structure.diag(), Q.diagonal().reshape(shape)) <= 1e-12
    assert relative(structure.dense(), Q) <= 1e-12
    got, want = structure.aux_grads(u, w), autograd_grads(structure, u, w)
    assert list(got) == list(structure.fishleg_aux)
    for name in want:
        assert relative(got[name], want[name]) <= 1e-12, name


@pytest.mark.parametrize(("kind", "layout", "shape"), CASES)
def test_sgd_start_is_a_multiple_of_the_identity(kind: str, layout: str, shape: tuple[int, int]) -> None:
    structure = make(kind, layout, shape)
    eye = torch.eye(shape[0] * shape[1], dtype=torch.float64)
    assert relative(dense_q(structure, structure.fishleg_aux), eye) <= 1e-15  # what a new one starts with
    randomise(structure)  # the start must not depend on what λ was
    for scale in (0.03, 7):
        structure.start_sgd(scale)
        assert relative(dense_q(structure, structure.fishleg_aux), scale * eye) <= 1e-15
        assert relative(structure.diag().reshape(-1), scale * eye.diagonal()) <= 1e-15


@pytest.mark.parametrize(("kind", "layout", "shape"), CASES)
def test_kfac_start_inverts_the_damped_factors(kind: str, layout: str, shape: tuple[int, int]) -> None:
    damping = 1e-3 if shape[0] > 1 else 0.5
    structure = make(kind, layout, shape)
    randomise(structure)
    m, n = shape
    if kind == "diagonal":
        diagonal = randn(m, n, seed=4) ** 2
        structure.start_kfac({"diagonal": diagonal}, damping)
        want = torch.diag(1 / (diagonal.reshape(-1) + damping))
    else:
        x, y = randn(m, 2 * m, seed=4), randn(n, 2 * n, seed=5)
        empty = structure.new_moments()
        moments = {"rows": laid_out(3 * x @ x.T, empty["rows"])}
        moments["columns"] = laid_out(y @ y.T, empty["columns"])
        structure.start_kfac(moments, damping)
        if 0 in shape:
            return
        G, A = full(moments["rows"], m), full(moments["columns"], n)
        pi = ((A.trace() / n) / (G.trace() / m)).sqrt()
        eye_m, eye_n = torch.eye(m, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
        P = torch.linalg.inv(G + damping**0.5 / pi * eye_m)
        S = torch.linalg.inv(A + pi * damping**0.5 * eye_n)
        want = torch.kron(P, S)
    assert relative(dense_q(structure, structure.fishleg_aux), want) <= 1e-10
    assert relative(structure.dense(), want) <= 1e-10


@pytest.mark.parametrize("kind", [k for k in MAKERS if k != "diagonal"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_second_moments(kind: str, layout: str) -> None:
    structure = make(kind, layout, (5, 7))
    grads = [randn(5, 7, seed=s) for s in range(3)]
    rows, columns = sum(g @ g.T for g in grads) / 3, sum(g.T @ g for g in grads) / 3
    got = structure.gradient_moments(grads)
    assert relative(got["rows"], laid_out(rows, got["rows"]) / rows.trace().sqrt()) <= 1e-12
    assert relative(got["columns"], laid_out(columns, got["columns"]) / columns.trace().sqrt()) <= 1e-12
    e, a = randn(11, 5, seed=4), randn(22, 7, seed=5)
    got = structure.layer_moments(a, e, 11)
    assert relative(got["rows"], laid_out(11 * e.T @ e, got["rows"])) <= 1e-12
    assert relative(got["columns"], laid_out(a.T @ a / 22, got["columns"])) <= 1e-12


def test_second_moments_of_a_diagonal() -> None:
    structure = Diagonal((5, 7), dtype=torch.float64)
    grads = [randn(5, 7, seed=s) for s in range(3)]
    assert relative(structure.gradient_moments(grads)["diagonal"], sum(g**2 for g in grads) / 3) <= 1e-12
    e, a = randn(11, 5, seed=4), randn(11, 7, seed=5)
    samples = 11 * torch.einsum("bi,bj->bij", e, a)  # of a mean over 11 terms: each term's own
    assert relative(structure.layer_moments(a, e, 11)["diagonal"], (samples**2).mean(0)) <= 1e-12


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", ["dense", "R-diagonal", "both-diagonal", "blocks-of-4"])
@pytest.mark.parametrize("kind", ["kron", "diagkron", "sumkron2"])
def test_kfac_start_refuses_what_is_not_finite(kind: str, layout: str, bad: float) -> None:
    for where in ("rows", "columns"):
        structure = make(kind, layout, (5, 3))
        randomise(structure)
        before = {name: t.clone() for name, t in structure.fishleg_aux.items()}
        empty = structure.new_moments()
        moments = {"rows": laid_out(torch.eye(5).double(), empty["rows"])}
        moments["columns"] = laid_out(torch.eye(3).double(), empty["columns"])
        moments[where].reshape(-1)[0] = bad
        with pytest.raises(torch.linalg.LinAlgError):
            structure.start_kfac(moments, 0.1)
        assert all(torch.equal(t, before[name]) for name, t in structure.fishleg_aux.items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_kfac_start_of_a_diagonal_refuses_what_is_not_finite(bad: float) -> None:
    structure = Diagonal((5, 3))
    with pytest.raises(torch.linalg.LinAlgError):
        structure.start_kfac({"diagonal": torch.full((5, 3), bad)}, 0.1)
    assert torch.equal(structure.fishleg_aux["d"], torch.ones(5, 3))


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("layout", ["dense", "blocks-of-4"])
def test_cached_products_follow_edits_of_lambda(kind: str, layout: str) -> None:
    structure = make(kind, layout, (5, 3))
    randomise(structure)
    u = randn(5, 3)
    for name in structure.fishleg_aux:
        structure.Qv(u)
        structure.fishleg_aux[name].mul_(1.5)
        want = dense_q(structure, structure.fishleg_aux) @ u.reshape(-1)
        assert relative(structure.Qv(u).reshape(-1), want) <= 1e-12, f"{name} edited in place"
        structure.fishleg_aux[name] = structure.fishleg_aux[name] * 0.5
        want = dense_q(structure, structure.fishleg_aux) @ u.reshape(-1)
        assert relative(structure.Qv(u).reshape(-1), want) <= 1e-12, f"{name} replaced"
        structure.fishleg_aux[name][..., 0] *= -3.0
        want = dense_q(structure, structure.fishleg_aux).diagonal()
        assert relative(structure.diag().reshape(-1), want) <= 1e-12, f"{name} edited through a view"


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_the_arguments_do_not_matter(kind: str, layout: str) -> None:
    if kind == "diagonal" and layout != "dense":
        return
    structure = make(kind, layout, (5, 3))
    randomise(structure)
    transposed = randn(3, 5).T
    strided = randn(10, 9, seed=1)[::2, ::3]
    expanded = randn(5, 1, seed=2).expand(5, 3)
    for u, w in [(transposed, strided), (strided, expanded), (expanded, transposed)]:
        kept = u.clone(), w.clone()
        assert torch.allclose(structure.Qv(u), structure.Qv(u.contiguous()), rtol=1e-13, atol=0)
        want = structure.aux_grads(u.contiguous(), w.contiguous())
        for name, g in structure.aux_grads(u, w).items():
            assert relative(g, want[name]) <= 1e-14, name
        assert torch.equal(u, kept[0]) and torch.equal(w, kept[1])  # arguments are not written to


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 3), (17, 33)])
def test_float32(kind: str, layout: str, shape: tuple[int, int]) -> None:
    if kind == "diagonal" and layout != "dense":
        return
    structure = make(kind, layout, shape, torch.float32)
    randomise(structure)
    u, w = randn(*shape, seed=2, dtype=torch.float32), randn(*shape, seed=3, dtype=torch.float32)
    Q = dense_q(structure, {name: t.double() for name, t in structure.fishleg_aux.items()})
    got = structure.Qv(u)
    assert got.dtype == torch.float32
    assert relative(got, (Q @ u.double().reshape(-1)).reshape(shape)) <= 2e-6
    assert relative(structure.diag(), Q.diagonal().reshape(shape)) <= 2e-6
    want = autograd_grads(structure, u, w)
    for name, g in structure.aux_grads(u, w).items():
        assert g.dtype == torch.float32
        assert relative(g, want[name]) <= 1e-5, name


def test_diagonal_takes_any_shape() -> None:
    for shape in [(), (5,), (2, 3, 4), (0,)]:
        structure = Diagonal(shape, dtype=torch.float64)
        randomise(structure)
        d, u, w = structure.fishleg_aux["d"], randn(*shape), randn(*shape, seed=1)
        assert relative(structure.Qv(u), d**2 * u) <= 1e-15
        assert relative(structure.diag(), d**2) <= 1e-15
        assert relative(structure.aux_grads(u, w)["d"], 2 * d * u * w) <= 1e-15
        assert relative(structure.dense(), torch.diag(d.reshape(-1) ** 2)) <= 1e-15


@pytest.mark.parametrize("kind", MAKERS)
def test_wrong_arguments_are_named(kind: str) -> None:
    structure = make(kind, "dense", (5, 3), torch.float32)
    good = randn(5, 3, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"u should have shape \(5, 3\) but has: \(3, 5\)"):
        structure.Qv(good.T)
    with pytest.raises(ValueError, match=r"w should have shape \(5, 3\) but has: \(15,\)"):
        structure.aux_grads(good, good.reshape(-1))
    for wrong in (torch.float64, torch.bfloat16, torch.int64):
        with pytest.raises(TypeError, match=r"u should have .*torch.float32 .*" + str(wrong)):
            structure.Qv(good.to(wrong))
        with pytest.raises(TypeError, match=r"w should have .*torch.float32 .*" + str(wrong)):
            structure.aux_grads(good, good.to(wrong))
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale should be"):
            structure.start_sgd(scale)
    assert torch.equal(structure.dense(), torch.eye(15)), "a refused call changed λ"


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: Kron(-1, 3), "-1"),
        (lambda: Kron(2.0, 3), "2.0"),
        (lambda: DiagKron(True, 3), "True"),
        (lambda: Kron(2, 3, diagonal=("X",)), "diagonal should name"),
        (lambda: Kron(2, 3, max_factor_size=0), "max_factor_size should be"),
        (lambda: SumKron(2, 3, terms=0), "terms should be"),
        (lambda: Kron(2, 3, dtype=torch.bfloat16), "bfloat16"),
        (lambda: Diagonal((2,), dtype=torch.int64), "int64"),
        (lambda: Diagonal((2, -1)), "-1"),
    ],
)
def test_wrong_constructor_arguments(build, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build()


def test_factors_never_outgrow_the_limit() -> None:
    for size in range(1, 30):
        for limit in range(1, 12):
            R = Kron(size, 1, max_factor_size=limit).fishleg_aux["R"]
            assert R.shape[-1] <= limit
            assert R.shape == (size, size) if size <= limit else R.shape[0] * R.shape[1] >= size


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(sorted(MAKERS)),
    shape=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    diagonal=st.sets(st.sampled_from("RL")),
    limit=st.none() | st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**20),
)
def test_properties(kind, shape, diagonal, limit, dtype, seed) -> None:
    """Linear, symmetric, positive semi-definite; gradients have λ's shapes; ⟨λ, ∂s/∂λ⟩ = 2s."""
    structure = MAKERS[kind](*shape, diagonal=tuple(diagonal), max_factor_size=limit, dtype=dtype)
    randomise(structure, seed)
    u, w = randn(*shape, seed=seed + 1, dtype=dtype), randn(*shape, seed=seed + 2, dtype=dtype)
    eps = torch.finfo(dtype).eps
    Q = structure.dense()
    assert Q.dtype == dtype and Q.shape == (u.numel(), u.numel())
    size = Q.norm().item()
    assert (Q - Q.T).norm().item() <= 20 * eps * size
    if u.numel():
        assert torch.linalg.eigvalsh(Q.double()).min() >= -20 * eps * size
    assert (structure.diag().reshape(-1) - Q.diagonal()).norm() <= 20 * eps * size
    Qu, Qw = structure.Qv(u), structure.Qv(w)
    bound = 40 * eps * size * (1 + u.norm() + w.norm()) ** 2
    assert (structure.Qv(2 * u - 0.5 * w) - (2 * Qu - 0.5 * Qw)).norm() <= bound
    s = (w * Qu).sum().item()
    assert abs(s - (u * Qw).sum().item()) <= bound
    grads = structure.aux_grads(u, w)
    totals: dict[str, float] = {}
    for name, t in structure.fishleg_aux.items():
        assert grads[name].shape == t.shape and grads[name].dtype == dtype
        totals[name[0]] = totals.get(name[0], 0.0) + (t * grads[name]).sum().item()
    for total in totals.values():
        assert abs(total - 2 * s) <= 20 * bound
