"""Likelihoods against torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Normal

from fishleg_fast.likelihoods import BernoulliLikelihood, CategoricalLikelihood, GaussianLikelihood, Likelihood
from support.dense import randn, relative
from support.likelihoods import CASES


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
    with pytest.raises(TypeError, match=r"outputs should be a tensor but is: tuple; pass the logits, outputs\[0\] say"):
        likelihood.nll(y, (f,))
    with pytest.raises(TypeError, match=r"but is: dict; pass the logits, outputs\['logits'\]"):
        likelihood.nll(y, {"logits": f})
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
    for bad in (1.0, True, "last"):
        with pytest.raises(TypeError, match="class_dim should be an integer"):
            CategoricalLikelihood(class_dim=bad)
    for bad in (torch.ones(2, 2), -torch.ones(2), torch.tensor([1.0, math.nan])):
        with pytest.raises(ValueError, match="weight should be"):
            CategoricalLikelihood(weight=bad)


def test_targets_that_are_no_probabilities() -> None:
    likelihood, f = BernoulliLikelihood(), randn(2, 3)
    for low, high in ((-0.5, 1.0), (0.0, 255.0)):
        y = torch.tensor([[low, 0.5, 1.0], [0.0, 0.5, high]])
        with pytest.raises(ValueError, match=rf"in \[0, 1\] but are from {low:g} to {high:g}; scale them"):
            likelihood.nll(y, f.float())
    rounded = torch.full((2, 3), 1.00001)
    assert torch.isfinite(likelihood.nll(rounded, f.float()))
    nll = torch.func.vmap(likelihood.nll)(torch.ones(4, 2, 3), randn(4, 2, 3))  # where there are no values to look at
    assert nll.shape == (4,)


@pytest.mark.parametrize(
    ("class_dim", "shape", "doubted"),
    [
        (None, (2, 3, 5), True), (None, (2, 5), False), (None, (2, 5, 3, 3), False), (1, (2, 3, 5), False),
        (-1, (2, 3, 5), False),
    ],
)  # fmt: skip
def test_a_dimension_of_classes_that_nobody_chose(class_dim: int | None, shape: tuple[int, ...], doubted: bool) -> None:
    told = CategoricalLikelihood(class_dim).doubt(randn(*shape))
    assert (told is not None) == doubted
    if told is not None:
        assert "3 classes at 5 positions" in told and "class_dim=-1" in told


def test_targets_can_show_the_dimension_of_classes() -> None:
    for shape, doubted in (((2, 3, 5), False), ((2, 3, 3), True)):
        likelihood, f = CategoricalLikelihood(), randn(*shape)
        likelihood.nll(torch.zeros(shape[0], shape[2], dtype=torch.int64), f)
        assert (likelihood.doubt(f) is not None) == doubted
