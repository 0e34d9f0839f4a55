"""Likelihoods against torch.distributions; their Fisher matrices against all possible targets."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from dense import output_fisher, randn, relative
from torch import Tensor
from torch.autograd.functional import hessian
from torch.distributions import Bernoulli, Categorical, Normal

from fishleg_fast.likelihoods import (
    BernoulliLikelihood,
    CategoricalLikelihood,
    GaussianLikelihood,
    Likelihood,
)

CASES = {  # kind: (likelihood, outputs' shape)
    "gaussian": (GaussianLikelihood, (3, 2)),
    "bernoulli": (BernoulliLikelihood, (3, 2)),
    "categorical": (CategoricalLikelihood, (3, 4)),
    "images": (CategoricalLikelihood, (2, 3, 1, 2)),
    "lm": (lambda: CategoricalLikelihood(class_dim=-1), (2, 2, 3)),
}


def enumerated(likelihood: Likelihood, kind: str, f: Tensor) -> list[tuple[float, Tensor]]:
    """Every target with its probability, by the textbook."""
    if kind == "bernoulli":
        p = 1 / (1 + torch.exp(-f))
        ys = [
            torch.tensor(bits, dtype=f.dtype).reshape(f.shape) for bits in itertools.product([0, 1], repeat=f.numel())
        ]
        return [(torch.where(y == 1, p, 1 - p).prod().item(), y) for y in ys]
    logits = f.movedim(likelihood.class_dim, -1)
    p = (torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)).flatten(0, -2)
    ys = itertools.product(range(p.shape[1]), repeat=p.shape[0])
    shape = logits.shape[:-1]
    return [(p[torch.arange(len(y)), list(y)].prod().item(), torch.tensor(y).reshape(shape)) for y in ys]


def matrix_of(product, f: Tensor) -> Tensor:
    """The matrix of v -> product(f, v)."""
    basis = torch.eye(f.numel(), dtype=f.dtype)
    return torch.stack([product(f, e.reshape(f.shape)).reshape(-1) for e in basis], dim=1)


@pytest.mark.parametrize("kind", ["bernoulli", "categorical", "images", "lm"])
def test_fisher_product_is_the_expected_hessian_over_all_targets(kind: str) -> None:
    build, shape = CASES[kind]
    likelihood, f = build(), randn(*shape)
    expected, squares, total = torch.zeros(f.numel(), f.numel(), dtype=f.dtype), 0, 0
    for probability, y in enumerated(likelihood, kind, f):
        H = hessian(lambda o, y=y: likelihood.nll(y, o), f).reshape(f.numel(), f.numel())
        leaf = f.clone().requires_grad_()
        (g,) = torch.autograd.grad(likelihood.nll(y, leaf), leaf)
        expected += probability * H
        squares += probability * torch.outer(g.reshape(-1), g.reshape(-1))
        total += probability
    assert abs(total - 1) <= 1e-12
    got = matrix_of(likelihood.fisher_product, f)
    assert relative(got, expected) <= 1e-12
    assert relative(got, squares * likelihood.terms(f)) <= 1e-12  # N·E[g gᵀ] is the same
    assert relative(got, output_fisher(kind if kind != "images" else "categorical", f)) <= 1e-12


@pytest.mark.parametrize("sigma", [1.0, 0.3])
@pytest.mark.parametrize("learn", [False, True])
def test_gaussian_fisher_is_the_expected_hessian(sigma: float, learn: bool) -> None:
    """E over y by Gauss-Hermite quadrature, nodes ±σ about each output: exact for a quadratic."""
    fixed = GaussianLikelihood(sigma)
    likelihood = GaussianLikelihood(sigma, learn=True).double()  # whose nll can be differentiated by log σ
    f = randn(2, 3)
    size, log_sigma = f.numel(), torch.tensor(sigma, dtype=torch.float64).log()
    likelihood.log_sigma.data.copy_(log_sigma)
    expected, squares = torch.zeros(size + 1, size + 1).double(), torch.zeros(size, size).double()

    def nll(o: Tensor, log_s: Tensor, y: Tensor) -> Tensor:
        return torch.func.functional_call(likelihood, {"log_sigma": log_s}, (y, o))

    for signs in itertools.product([-1.0, 1.0], repeat=size):
        y = f + log_sigma.exp() * torch.tensor(signs).double().reshape(f.shape)
        (ff, fs), (sf, ss) = hessian(lambda o, s, y=y: nll(o, s, y), (f, log_sigma))
        top = torch.cat([ff.reshape(size, size), fs.reshape(size, 1)], 1)
        expected += torch.cat([top, torch.cat([sf.reshape(1, size), ss.reshape(1, 1)], 1)]) / 2**size
        g = torch.func.grad(nll)(f, log_sigma, y).reshape(-1)
        squares += torch.outer(g, g) / 2**size
    tested = likelihood if learn else fixed
    got = matrix_of(tested.fisher_product, f)
    assert relative(got, expected[:size, :size]) <= 1e-12
    assert relative(got, squares * likelihood.terms(f)) <= 1e-12
    assert relative(got, output_fisher("gaussian", f, float(log_sigma.exp()))) <= 1e-12
    v = randn()
    own = tested.own_fisher_product(f, [v] if learn else [])
    if learn:
        assert relative(own[0], expected[-1, -1] * v) <= 1e-12
        assert expected[-1, :-1].norm() <= 1e-12  # outputs and σ are uncorrelated
    else:
        assert own == []


def test_weighted_categorical_fisher() -> None:
    """One position: the weight cancels. Several: a ratio of expectations in place of the expected ratio."""
    weight = torch.tensor([0.5, 1.0, 2.0]).double()
    likelihood = CategoricalLikelihood(weight=weight)
    f = randn(1, 3)
    assert relative(matrix_of(likelihood.fisher_product, f), output_fisher("categorical", f)) <= 1e-12
    f = randn(5, 3)
    top, bottom, ratio = 0, 0, 0
    for probability, y in enumerated(likelihood, "categorical", f):
        H = hessian(lambda o, y=y: F.cross_entropy(o, y, weight=weight), f).reshape(15, 15)
        top, bottom = top + probability * H * weight[y].sum(), bottom + probability * weight[y].sum()
        ratio = ratio + probability * H
    got = matrix_of(likelihood.fisher_product, f)
    assert relative(got, top / bottom) <= 1e-12
    assert relative(got, ratio) <= 0.04  # measured 0.023 at five positions; it falls as their number grows
    equal = CategoricalLikelihood(weight=torch.ones(3))
    assert relative(matrix_of(equal.fisher_product, f), output_fisher("categorical", f)) <= 1e-12


class OwnPoisson(Likelihood):
    """A user's likelihood of nothing but nll and draw: y ~ Poisson(exp f), in its natural parameter."""

    def nll(self, targets: Tensor, outputs: Tensor) -> Tensor:
        return (outputs.exp() - targets * outputs).sum() / outputs.shape[0]

    def draw(self, outputs: Tensor) -> Tensor:
        return torch.poisson(outputs.exp())


class OwnCauchy(Likelihood):
    """Its Hessian depends on the targets: Fisher information 1/2 of each output."""

    def nll(self, targets: Tensor, outputs: Tensor) -> Tensor:
        return torch.log1p((targets - outputs) ** 2).sum() / outputs.shape[0]

    def draw(self, outputs: Tensor) -> Tensor:
        return outputs + torch.empty_like(outputs).cauchy_()


def test_base_class_fisher_product() -> None:
    f, v = randn(3, 2), randn(3, 2, seed=1)
    assert relative(OwnPoisson().fisher_product(f, v), f.exp() * v / 3) <= 1e-12
    assert not f.requires_grad
    f = randn(50_000, 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        samples = OwnCauchy().fisher_product(f, torch.ones_like(f)) * len(f)
    error = samples.std() / math.sqrt(len(f))
    assert abs(samples.mean() - 0.5) <= 5 * error and error < 0.01
    with torch.no_grad():  # callers of ggn are inside an optimizer's step
        assert relative(OwnPoisson().fisher_product(f, f), f.exp() * f / len(f)) <= 1e-12


def test_base_class_names_what_is_missing() -> None:
    for call, name in [
        (lambda: Likelihood().nll(randn(2), randn(2)), "nll"),
        (lambda: Likelihood().draw(randn(2)), "draw"),
        (lambda: Likelihood().own_fisher_product(randn(2), [randn()]), "own_fisher_product"),
    ]:
        with pytest.raises(NotImplementedError, match=name):
            call()


@pytest.mark.parametrize("shape", [(4,), (4, 3), (2, 3, 5), (1, 1)])
@pytest.mark.parametrize("sigma", [1.0, 0.3])
def test_gaussian_nll(shape: tuple[int, ...], sigma: float) -> None:
    y, f = randn(*shape), randn(*shape, seed=1)
    want = -Normal(f, sigma).log_prob(y).sum() / shape[0]
    assert relative(GaussianLikelihood(sigma).nll(y, f), want) <= 1e-12
    assert relative(GaussianLikelihood(sigma)(y.float(), f.float()), want) <= 1e-5


@pytest.mark.parametrize("shape", [(4,), (4, 3), (2, 3, 5)])
def test_bernoulli_nll(shape: tuple[int, ...]) -> None:
    f = 3 * randn(*shape, seed=1)
    y = (randn(*shape) > 0).double()
    want = -Bernoulli(logits=f).log_prob(y).sum() / shape[0]
    for dtype in (torch.float64, torch.int64, torch.bool, torch.uint8, torch.float32):
        assert relative(BernoulliLikelihood().nll(y.to(dtype), f), want) <= 1e-12
    grey = torch.sigmoid(randn(*shape, seed=2))
    p = torch.sigmoid(f)
    want = -(grey * p.log() + (1 - grey) * (1 - p).log()).sum() / shape[0]
    assert relative(BernoulliLikelihood().nll(grey, f), want) <= 1e-12
    far = torch.full((2, 1), 1e4).double()
    assert BernoulliLikelihood().nll(torch.zeros_like(far), far) == 1e4  # no overflow


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize(
    ("class_dim", "shape"),
    [(1, (6, 5)), (1, (2, 5, 3, 4)), (1, (2, 5, 3)), (-1, (2, 3, 5)), (-1, (6, 5)), (2, (2, 3, 5))],
)
def test_categorical_nll(class_dim, shape, ignored: bool, weighted: bool, dtype: torch.dtype) -> None:
    weight = torch.tensor([0.1, 1.0, 2.0, 0.0, 3.0]).double() if weighted else None
    index = 2 if ignored else -100
    f = randn(*shape)
    classes_second = f.movedim(class_dim, 1)
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(5, (shape[0], *classes_second.shape[2:]), generator=generator)
    likelihood = CategoricalLikelihood(class_dim, ignore_index=index, weight=weight)
    want = F.cross_entropy(classes_second, y, weight=weight, ignore_index=index)
    assert relative(likelihood.nll(y.to(dtype), f), want) <= 1e-12
    by_hand = -Categorical(logits=f.movedim(class_dim, -1)).log_prob(y)
    w = torch.ones(5).double()[y] if weight is None else weight[y]
    w = w * (y != index)
    assert relative(likelihood.nll(y, f), (w * by_hand).sum() / w.sum()) <= 1e-12


def test_categorical_where_batch_equals_classes() -> None:
    """(B, C) with B = C: targets are indices all the same, and one-hot ones are refused, not misread."""
    f, y = randn(4, 4), torch.tensor([2, 0, 3, 3])
    likelihood = CategoricalLikelihood()
    assert relative(likelihood.nll(y, f), F.cross_entropy(f, y)) <= 1e-12
    one_hot = F.one_hot(y, 4)
    with pytest.raises(ValueError, match=r"targets should have shape \(4,\) .* but has: \(4, 4\)"):
        likelihood.nll(one_hot, f)
    for soft in (one_hot.double(), one_hot.bool()):
        with pytest.raises(TypeError, match=r"integer class indices .*argmax"):
            likelihood.nll(soft, f)


DRAWS = 40_000


def _frequencies(likelihood: Likelihood, f: Tensor) -> Tensor:
    """The mean and the standard error of DRAWS draws at each output."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return likelihood.draw(f.expand(DRAWS, *f.shape[1:]))


def test_gaussian_draws() -> None:
    f = randn(1, 3)
    y = _frequencies(GaussianLikelihood(0.3), f)
    assert y.dtype == f.dtype and y.shape == (DRAWS, 3)
    assert ((y.mean(0) - f).abs() <= 5 * 0.3 / math.sqrt(DRAWS)).all()
    assert ((y.std(0) / 0.3 - 1).abs() <= 5 / math.sqrt(2 * DRAWS)).all()
    assert torch.corrcoef(y.T).fill_diagonal_(0).abs().max() <= 5 / math.sqrt(DRAWS)  # independent


def test_bernoulli_draws() -> None:
    f = randn(1, 2, 3)
    y = _frequencies(BernoulliLikelihood(), f)
    assert y.dtype == f.dtype and ((y == 0) | (y == 1)).all()
    p = torch.sigmoid(f[0])
    assert ((y.mean(0) - p).abs() <= 5 * (p * (1 - p) / DRAWS).sqrt()).all()


@pytest.mark.parametrize(("class_dim", "shape"), [(1, (1, 4)), (1, (1, 4, 2, 1)), (-1, (1, 3, 4))])
def test_categorical_draws(class_dim: int, shape: tuple[int, ...]) -> None:
    f = randn(*shape)
    likelihood = CategoricalLikelihood(class_dim)
    y = _frequencies(likelihood, f)
    p = torch.softmax(f, class_dim).movedim(class_dim, -1)[0]
    assert y.dtype == torch.int64 and y.shape == (DRAWS, *p.shape[:-1])
    got = F.one_hot(y, 4).double().mean(0)
    assert ((got - p).abs() <= 5 * (p * (1 - p) / DRAWS).sqrt()).all()


def test_draws_never_take_the_ignored_class() -> None:
    """A padding token is a class too: drawn, it would leave the loss a mean over fewer positions, or none."""
    likelihood = CategoricalLikelihood(class_dim=-1, ignore_index=0)
    y = _frequencies(likelihood, randn(1, 3, 4))
    assert (y != 0).all()
    certain = torch.tensor([[[50.0, 0.0, 0.0]]])
    assert torch.isfinite(likelihood.nll(likelihood.draw(certain), certain))


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(kind: str, dtype: torch.dtype) -> None:
    build, shape = CASES[kind]
    likelihood, f, v = build(), randn(*shape, dtype=dtype), randn(*shape, seed=1, dtype=dtype)
    tolerance = 4 * torch.finfo(dtype).eps
    got = likelihood.fisher_product(f, v)
    assert got.dtype == dtype
    assert relative(got, likelihood.fisher_product(f.double(), v.double())) <= tolerance
    y = likelihood.draw(f)
    want = likelihood.nll(y.double() if y.is_floating_point() else y, f.double())
    assert relative(likelihood.nll(y, f), want) <= tolerance


def test_learned_sigma() -> None:
    likelihood = GaussianLikelihood(0.7, learn=True).double()
    assert [name for name, _ in likelihood.named_parameters()] == ["log_sigma"]
    fixed = GaussianLikelihood(0.7)
    assert not list(fixed.parameters()) and fixed.sigma.item() == pytest.approx(0.7)
    y, f = randn(50, 3), randn(50, 3, seed=1)
    sigma = likelihood.sigma.detach().clone().requires_grad_()
    want = torch.autograd.grad(-Normal(f, sigma).log_prob(y).sum() / 50, sigma)[0] * sigma.detach()
    (got,) = torch.autograd.grad(likelihood.nll(y, f), likelihood.log_sigma)
    assert relative(got, want) <= 1e-12
    optimizer = torch.optim.LBFGS(likelihood.parameters(), line_search_fn="strong_wolfe", max_iter=50)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = likelihood.nll(y, f)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert relative(likelihood.sigma.detach(), (y - f).square().mean().sqrt()) <= 1e-5


@pytest.mark.parametrize("sigma", [0, -1.0, math.nan, math.inf, "1", None, torch.tensor(1.0)])
def test_wrong_sigma(sigma: object) -> None:
    with pytest.raises(ValueError, match="sigma should be a positive number"):
        GaussianLikelihood(sigma)


@pytest.mark.parametrize("kind", CASES)
def test_wrong_arguments(kind: str) -> None:
    build, shape = CASES[kind]
    likelihood, f = build(), randn(*shape)
    y = likelihood.draw(f)
    with pytest.raises(TypeError, match="targets should be a tensor but is: list"):
        likelihood.nll(y.tolist(), f)
    with pytest.raises(TypeError, match="outputs should be a tensor but is: tuple"):
        likelihood.nll(y, (f,))
    with pytest.raises(ValueError, match="shape"):
        likelihood.nll(y[:-1], f)
    with pytest.raises(ValueError, match="shape"):
        likelihood.nll(y[..., None], f)
    with pytest.raises(TypeError, match="outputs should be floating point"):
        likelihood.nll(y, f.long())
    with pytest.raises(ValueError, match="empty"):
        likelihood.nll(y[:0], f[:0])
    with pytest.raises((TypeError, ValueError), match=r"\(targets, outputs\), in this order"):
        likelihood.nll(f.requires_grad_(), y)  # swapped


def test_wrong_categorical_arguments() -> None:
    f = randn(2, 3, 5)
    with pytest.raises(ValueError, match="class_dim=-1"):  # (B, T, V) taken for (B, C, positions)
        CategoricalLikelihood().nll(torch.zeros(2, 3, dtype=torch.long), f)
    with pytest.raises(ValueError, match="dimension 3 for the classes"):
        CategoricalLikelihood(class_dim=3).nll(torch.zeros(2, 3, dtype=torch.long), f)
    for bad in (1.0, True, None):
        with pytest.raises(TypeError, match="class_dim should be an integer"):
            CategoricalLikelihood(class_dim=bad)
    for bad in (torch.ones(2, 2), -torch.ones(2), torch.tensor([1.0, math.nan])):
        with pytest.raises(ValueError, match="weight should be"):
            CategoricalLikelihood(weight=bad)
