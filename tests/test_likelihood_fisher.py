"""Fisher matrices of likelihoods against all possible targets."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.functional import hessian

from fishleg_fast.likelihoods import CategoricalLikelihood, GaussianLikelihood, Likelihood
from support.dense import output_fisher, randn, relative
from support.likelihoods import CASES


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
