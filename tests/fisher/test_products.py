"""Fisher-vector products of small networks against the explicit matrix Jᵀ H_out J in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fishleg_fast.fisher import products
from fishleg_fast.likelihoods import BernoulliLikelihood, CategoricalLikelihood, GaussianLikelihood, Likelihood
from fishleg_fast.passes.inputs import Inputs
from fishleg_fast.passes.isolated import IsolatedPasses
from support.dense import explicit_fisher, flat, jacobian, output_fisher, randn, relative, split_like

LIKELIHOODS = {
    "gaussian": lambda: GaussianLikelihood(0.5),
    "bernoulli": BernoulliLikelihood,
    "categorical": CategoricalLikelihood,
}


class Shared(nn.Module):
    """One matrix used three times: twice as a shared layer, once tied, transposed, as the read-out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.again = self.layer
        self.out = nn.Linear(4, 4, bias=False)
        self.out.weight = self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x))
        return self.out(torch.tanh(self.again(h))) + h @ self.layer.weight.T[:, [1, 0, 3, 2]]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))


def convnet() -> nn.Module:
    first, second = nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Conv2d(4, 3, 2, stride=2, bias=False)
    return nn.Sequential(nn.Sequential(first, nn.ELU(), second), nn.Flatten(), nn.Linear(12, 3))


def pixels() -> nn.Module:
    """(B, 2, 3, 3) -> (B, 3, 3, 3): an output at each position."""
    return nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.GELU(), nn.Conv2d(2, 3, 1))


def words() -> nn.Module:
    """(B, T) indices -> (B, T, 5) logits."""
    return nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5))


NETWORKS = {
    "mlp": (mlp, randn(6, 3, seed=1)),
    "convnet": (convnet, randn(4, 2, 4, 4, seed=1)),
    "shared": (Shared, randn(5, 4, seed=1)),
    "pixels": (pixels, randn(2, 2, 3, 3, seed=1)),
}


def build(network: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    make, x = NETWORKS[network]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().to(dtype), x.to(dtype)


def passes_of(model: nn.Module, likelihood: Likelihood | None, x: Tensor, seed: int = 0, own=None) -> IsolatedPasses:
    draw, nll = own or (None, None)
    return IsolatedPasses(model, draw, nll, likelihood, [x], seed)


def product(name: str, passes: IsolatedPasses, params: list[Tensor], v: Tensor) -> Tensor:
    """One estimate of F v, everything flat."""
    with torch.no_grad():  # as inside an optimizer's step
        return flat(products.FISHER[name](passes, params, split_like(v, params), passes.inputs()))


def trainable(model: nn.Module, likelihood: nn.Module | None = None) -> list[Tensor]:
    return [*model.parameters(), *(likelihood.parameters() if likelihood is not None else ())]


@pytest.mark.parametrize("kind", LIKELIHOODS)
@pytest.mark.parametrize("network", NETWORKS)
def test_ggn_is_the_fisher_matrix(network: str, kind: str) -> None:
    (model, x), likelihood = build(network), LIKELIHOODS[kind]().double()
    passes, params = passes_of(model, likelihood, x), trainable(model)
    F = explicit_fisher(model, x, kind, sigma=float(likelihood.sigma) if kind == "gaussian" else 1.0)
    got = torch.stack([product("ggn", passes, params, e) for e in torch.eye(len(F)).double()], dim=1)
    assert relative(got, F) <= 1e-10
    assert product("ggn", passes, params, torch.zeros(len(F)).double()).count_nonzero() == 0


def test_ggn_of_a_language_model() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = words().double()
    x = torch.tensor([[0, 3, 1], [1, 1, 4]])
    passes, params = passes_of(model, CategoricalLikelihood(class_dim=-1), x), trainable(model)
    F = explicit_fisher(model, x, "lm")
    got = torch.stack([product("ggn", passes, params, e) for e in torch.eye(len(F)).double()], dim=1)
    assert relative(got, F) <= 1e-10
    v = randn(len(F), seed=2)
    estimates = torch.stack([product("rank1", passes, params, v) for _ in range(600)])
    error = estimates.std(0) / math.sqrt(len(estimates))
    assert ((estimates.mean(0) - F @ v).abs() <= 5 * error + 1e-12).all()  # 6 terms, not 2


def test_ggn_of_a_users_likelihood() -> None:
    """Only nll and draw: F by autograd on drawn targets, exact where the Hessian does not depend on them."""

    class Own(Likelihood):
        def nll(self, targets: Tensor, outputs: Tensor) -> Tensor:
            return (torch.nn.functional.softplus(outputs) - targets * outputs).sum() / len(outputs)

        def draw(self, outputs: Tensor) -> Tensor:
            return torch.bernoulli(torch.sigmoid(outputs))

    model, x = build("mlp")
    v = randn(sum(p.numel() for p in model.parameters()), seed=2)
    got = product("ggn", passes_of(model, Own(), x), trainable(model), v)
    assert relative(got, explicit_fisher(model, x, "bernoulli") @ v) <= 1e-10


def test_ggn_of_some_of_the_parameters() -> None:
    """Frozen and unused ones: the others' block of F; zero for what the output does not depend on."""
    model, x = build("mlp")
    model.extra = nn.Parameter(torch.ones(2).double())
    F = explicit_fisher(model[:], x, "bernoulli")
    model[0].requires_grad_(False)
    model.forward = lambda x: model[:](x)  # without .extra
    params = [p for p in model.parameters() if p.requires_grad]
    v = randn(sum(p.numel() for p in params), seed=2)
    passes = passes_of(model, BernoulliLikelihood(), x)
    want = F[20:, 20:] @ v[2:]
    for name in ("ggn", "hessian", "antithetic", "rank1"):
        got = product(name, passes, params, v)
        assert got[:2].count_nonzero() == 0 and torch.isfinite(got).all()
        if name == "ggn":
            assert relative(got[2:], want) <= 1e-10


SAMPLES = {"hessian": 200, "antithetic": 200, "rank1": 600}
NOISE = {"hessian": 0.15, "antithetic": 0.15, "rank1": 0.2}  # the standard error of their mean: at most, relative
SAMPLED = [("mlp", "gaussian"), ("mlp", "bernoulli"), ("convnet", "categorical"), ("shared", "categorical")]


@pytest.mark.parametrize(("network", "kind"), SAMPLED)
@pytest.mark.parametrize("name", SAMPLES)
def test_sampled_products_agree_in_expectation(name: str, network: str, kind: str) -> None:
    """Each component of the mean lies within five of its standard errors of the exact product."""
    (model, x), likelihood = build(network), LIKELIHOODS[kind]().double()
    passes, params = passes_of(model, likelihood, x), trainable(model)
    F = explicit_fisher(model, x, kind, sigma=float(likelihood.sigma) if kind == "gaussian" else 1.0)
    v = F @ randn(len(F), seed=2)  # where the matrix is not blind
    v /= v.norm()
    estimates = torch.stack([product(name, passes, params, v) for _ in range(SAMPLES[name])])
    want, mean = F @ v, estimates.mean(0)
    error = estimates.std(0) / math.sqrt(len(estimates))
    rounding = 1e-8 * want.norm()
    assert ((mean - want).abs() <= 5 * error + rounding).all(), ((mean - want) / error).abs().max()
    assert error.norm() <= NOISE[name] * want.norm(), error.norm() / want.norm()  # the test has power
    assert relative(mean, want) <= NOISE[name] * 2


@pytest.mark.parametrize("kind", LIKELIHOODS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 2e-3)])
def test_antithetic_error(network: str, kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """On the same labels the finite difference is the Hessian's product, to 1e-8 or (float32) 2e-3."""
    (model, x), (other, z), likelihood = build(network), build(network, dtype), LIKELIHOODS[kind]()
    y = likelihood.draw(model(x).detach())
    own = (
        lambda model, x: y,
        lambda model, x, y: likelihood.nll(y.to(x.dtype) if y.is_floating_point() else y, model(x)),
    )
    v = randn(sum(p.numel() for p in model.parameters()), seed=2)
    for scale in (1e-6, 1.0, 1e6):  # v's norm is no matter
        exact = product("hessian", passes_of(model, None, x, own=own), trainable(model), scale * v)
        got = product("antithetic", passes_of(other, None, z, own=own), trainable(other), scale * v)
        assert relative(got, exact) <= tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_ggn_in_lower_precision(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    model, x = build("mlp", dtype)
    likelihood = LIKELIHOODS[kind]()
    v = randn(sum(p.numel() for p in model.parameters()), seed=2, dtype=dtype)
    got = product("ggn", passes_of(model, likelihood, x), trainable(model), v)
    exact = explicit_fisher(model.double(), x.double(), kind, 0.5) @ v.double()
    assert relative(got, exact) <= tolerance


@pytest.mark.parametrize("name", products.FISHER)
def test_learned_sigma(name: str) -> None:
    """F over (θ, log σ) is block-diagonal: Jᵀ H_out J and 2D."""
    model, x = build("mlp")
    likelihood = GaussianLikelihood(0.7, learn=True).double()
    passes, params = passes_of(model, likelihood, x), trainable(model, likelihood)
    F = torch.block_diag(explicit_fisher(model, x, "gaussian", 0.7), torch.tensor(2.0 * 3).double())
    sigma = float(likelihood.sigma.detach())
    F[:-1, :-1] *= (0.7 / sigma) ** 2  # 0.7 was stored in float32
    v = F @ randn(len(F), seed=2)
    want = F @ v
    if name == "ggn":
        assert relative(product(name, passes, params, v), want) <= 1e-10
        return
    estimates = torch.stack([product(name, passes, params, v) for _ in range(SAMPLES[name])])
    error = estimates.std(0) / math.sqrt(len(estimates))
    assert ((estimates.mean(0) - want).abs() <= 5 * error + 1e-8 * want.norm()).all()


def test_a_users_own_draw_and_nll() -> None:
    """The talk's functions of the model estimate the same matrix; rank1 counts the batch's rows."""
    model, x = build("mlp")
    likelihood = BernoulliLikelihood()
    own = (
        lambda model, x: likelihood.draw(model(x)),
        lambda model, x, y: likelihood.nll(y, model(x)),
    )
    F = explicit_fisher(model, x, "bernoulli")
    v = F @ randn(len(F), seed=2)
    for name, count in SAMPLES.items():
        passes, params = passes_of(model, None, x, own=own), trainable(model)
        estimates = torch.stack([product(name, passes, params, v) for _ in range(count)])
        error = estimates.std(0) / math.sqrt(count)
        assert ((estimates.mean(0) - F @ v).abs() <= 5 * error + 1e-8 * (F @ v).norm()).all(), name


def test_the_textbook_matrices_are_right() -> None:
    """The truth of this file against brute force: N·E[g gᵀ] over all labels of a tiny model."""
    model, x = nn.Linear(2, 2).double(), randn(2, 2)
    f = model(x).detach()
    p, total = torch.sigmoid(f).reshape(-1), torch.zeros(6, 6).double()
    for code in range(16):
        y = torch.tensor([code >> i & 1 for i in range(4)]).double()
        g = ((p - y) / 2) @ jacobian(model, x)  # of the mean over two rows
        total += torch.where(y == 1, p, 1 - p).prod() * 2 * torch.outer(g, g)
    assert relative(explicit_fisher(model, x, "bernoulli"), total) <= 1e-12
    assert relative(output_fisher("gaussian", f, 0.5), torch.eye(4) * 2) <= 1e-12


def test_inputs_as_the_model_was_given_them() -> None:
    """Without a loader the last input given with gradients enabled is the curvature batch."""
    model, x = build("mlp")
    passes = IsolatedPasses(model, None, None, GaussianLikelihood(0.5), None, 0)
    with pytest.raises(RuntimeError, match="no curvature batch"):
        passes.inputs()
    model(x)
    with torch.no_grad():
        model(x * 2)  # an evaluation is none
    v = randn(sum(p.numel() for p in model.parameters()), seed=2)
    got = product("ggn", passes, trainable(model), v)
    assert relative(got, explicit_fisher(model, x, "gaussian", 0.5) @ v) <= 1e-6
    assert isinstance(passes.inputs(), Inputs) and torch.equal(passes.inputs().x, x)
