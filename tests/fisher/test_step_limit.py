"""Steps end where the loss's quadratic model has its minimum: against dense matrices, and on problems that are one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from fishleg_fast import BernoulliLikelihood, CategoricalLikelihood, FishLeg, GaussianLikelihood, Likelihood
from fishleg_fast.fisher.step_limit import line
from support.dense import randn, relative
from support.limited import linear, mlp, seeded, take


class NoForwardMode(torch.autograd.Function):
    """sin, without a forward derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.cos()


class Sine(nn.Module):
    opaque = False

    def forward(self, x: Tensor) -> Tensor:
        return NoForwardMode.apply(x) if self.opaque else x.sin()


class Poisson(Likelihood):
    """A user's own: rates exp(outputs)."""

    def nll(self, targets: Tensor, outputs: Tensor) -> Tensor:
        self.note(targets, outputs)
        return (outputs.exp() - targets * outputs).sum() / outputs.shape[0]

    def draw(self, outputs: Tensor) -> Tensor:
        return torch.poisson(outputs.exp())


def dense_line(
    net: nn.Module,
    likelihood: Likelihood,
    x: Tensor,
    y: Tensor,
    vs: dict[str, Tensor],
    hessian: Callable[[Tensor], Tensor],
) -> tuple[float, float, float]:
    """−gᵀv, the mean of its squares and vᵀFv from each sample's own Jacobian and gradient."""
    params = {name: p.detach() for name, p in net.named_parameters()}
    slopes, curvature = [], 0.0
    for xi, yi in zip(x, y, strict=True):
        J = jacrev(lambda p, xi=xi: functional_call(net, p, (xi[None],))[0])(params)
        Jv = sum(torch.tensordot(J[name], v, dims=v.ndim) for name, v in vs.items())
        output = functional_call(net, params, (xi[None],)).detach()
        e = torch.autograd.functional.jacobian(lambda o, yi=yi: likelihood.nll(yi[None], o), output)[0]
        slopes.append(-float(e @ Jv))
        curvature += float(Jv @ hessian(output[0]) @ Jv)
    each = torch.tensor(slopes, dtype=torch.float64)
    return float(each.mean()), float(each.square().mean()), curvature / len(each)


def bernoulli(o: Tensor) -> Tensor:
    return torch.diag(o.sigmoid() * (1 - o.sigmoid()))


def categorical(o: Tensor) -> Tensor:
    p = o.softmax(0)
    return torch.diag(p) - torch.outer(p, p)


CASES: dict[str, tuple[Likelihood, Callable[[Tensor], Tensor], Tensor]] = {
    "gaussian": (GaussianLikelihood(sigma=0.3), lambda o: torch.eye(len(o)).double() / 0.09, randn(9, 3)),
    "bernoulli": (BernoulliLikelihood(), bernoulli, (randn(9, 3) > 0).double()),
    "categorical": (CategoricalLikelihood(), categorical, torch.arange(9) % 3),
    "own": (Poisson(), lambda o: torch.diag(o.exp()), torch.arange(27).reshape(9, 3).double() % 4),
}


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:fisher='ggn'")
def test_line_is_that_of_dense_matrices(name: str, opaque: bool) -> None:
    likelihood, hessian, y = CASES[name]
    sine = Sine()
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 5), sine, nn.Linear(5, 3)))
    x = randn(9, 4)
    optimizer = FishLeg(net, likelihood=likelihood, curvature_batch=None)
    named = dict(net.named_parameters())
    vs = {key: randn(*p.shape) for key, p in named.items()}
    want = dense_line(net, likelihood, x, y, vs, hessian)
    passes, sine.opaque = optimizer._passes, opaque
    likelihood.nll(y, net(x))
    found = line(passes, [*named.values()], [*named.values()], [*vs.values()], passes.inputs())
    assert float(found[0]) == pytest.approx(want[0], rel=1e-6)
    assert float(found[2]) == pytest.approx(want[2], rel=1e-6)
    assert float(found[1]) == pytest.approx(want[0] ** 2 if opaque else want[1], rel=1e-6)
    assert float(found[3]) == (1 if opaque else 9)


def test_what_has_no_forward_derivative_is_told_of_once_and_limited_all_the_same() -> None:
    def run(opaque: bool) -> tuple[list[Tensor], list[str]]:
        sine, likelihood = Sine(), GaussianLikelihood()
        sine.opaque = opaque
        net = seeded(lambda: nn.Sequential(nn.Linear(4, 5), sine, nn.Linear(5, 3)))
        optimizer = FishLeg(net, likelihood=likelihood, lr=20.0, curvature_batch=None)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(6):
                take(net, optimizer, likelihood.nll, randn(8, 4), randn(8, 3))
        assert optimizer.diagnostics()["shortened_steps"] == 6
        return [p.detach() for p in net.parameters()], [str(w.message) for w in told]

    (exact, silent), (other, told) = run(False), run(True)
    assert not silent and len(told) == 1 and "differentiates twice" in told[0]
    for a, b in zip(exact, other, strict=True):
        assert relative(a, b) < 1e-9


def test_a_learned_sigma_counts() -> None:
    likelihood, net, x, y = GaussianLikelihood(learn=True).double(), mlp(), randn(6, 4), randn(6, 3)
    optimizer = FishLeg(net, likelihood=likelihood, curvature_batch=None)
    loss = likelihood.nll(y, net(x))
    params = [*net.parameters(), *likelihood.parameters()]
    vs = [randn(*p.shape) for p in params]
    slope = -sum(float((g * v).sum()) for g, v in zip(torch.autograd.grad(loss, params), vs, strict=True))
    passes = optimizer._passes
    found = line(passes, params, params, vs, passes.inputs())
    rest = line(passes, params[:-1], params[:-1], vs[:-1], passes.inputs())
    assert float(found[0]) == pytest.approx(slope, rel=1e-9)
    assert float(found[2] - rest[2]) == pytest.approx(2 * 3 * float(vs[-1]) ** 2, rel=1e-9)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("limit", [1.0, 0.5, 2.0])
def test_a_step_too_long_ends_at_so_many_times_the_minimum(limit: float, backend: str) -> None:
    net, optimizer, likelihood, x, y = linear(step_limit=limit, backend=backend)
    before = [p.detach().clone() for p in net.parameters()]
    take(net, optimizer, likelihood.nll, x, y)
    delta = [p.detach() - b for p, b in zip(net.parameters(), before, strict=True)]

    def loss(c: Tensor) -> Tensor:
        w, b = (p + c / limit * d for p, d in zip(before, delta, strict=True))
        return likelihood.nll(y, F.linear(x, w, b))

    c = torch.ones((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(c), c)
    assert abs(float(slope)) < 1e-9 * float(loss(torch.zeros(())) - loss(torch.ones(())))
    report = optimizer.diagnostics()
    assert report["shortened_steps"] == 1 and 0 < report["step_scale"] < 1


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}, {"momentum": "after"}, {"normalize": "spectral"}])
def test_steps_within_the_limit_are_the_same_bit_for_bit(settings: dict[str, Any]) -> None:
    def run(limit: float | None) -> list[Tensor]:
        net, optimizer, likelihood, x, y = linear(lr=1e-3, step_limit=limit, **settings)
        for _ in range(12):
            take(net, optimizer, likelihood.nll, x, y)
        assert limit is None or optimizer.diagnostics()["step_scale"] == 1
        return [p.detach() for p in net.parameters()]

    for a, b in zip(run(1.0), run(None), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("why", ["another loss", "other outputs", "loader", "draw and nll", "off"])
def test_without_targets_steps_are_as_lr_says(why: str) -> None:
    def run(limit: float | None) -> list[Tensor]:
        settings: dict[str, Any] = {"step_limit": limit}
        x, y = randn(12, 4), randn(12, 2)
        if why == "loader":
            settings["aux_loader"] = [(x, y)]
        if why == "draw and nll":
            draw = lambda model, x: model(x).detach()
            settings |= {"draw": draw, "nll": lambda model, x, y: (model(x) - y).square().sum() / 24}
        net, optimizer, likelihood, x, y = linear(**settings)
        nll: Callable[[Tensor, Tensor], Tensor] = likelihood.nll
        if why == "another loss":
            nll = lambda y, o: F.mse_loss(o, y)
        if why == "other outputs":
            nll = lambda y, o: likelihood.nll(y.reshape(-1, 1), o.reshape(-1, 1))
        for _ in range(3):
            take(net, optimizer, nll, x, y)
        assert optimizer.diagnostics().get("step_scale") is None
        return [p.detach() for p in net.parameters()]

    for a, b in zip(run(None if why == "off" else 1.0), run(None), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("structure", ["kron", "diagonal"])
def test_the_likelihoods_scale_does_not_matter(structure: str) -> None:
    def run(sigma: float) -> tuple[list[Tensor], int]:
        net, likelihood, x, y = mlp(), GaussianLikelihood(sigma), randn(16, 4), 3 * randn(16, 3)
        optimizer = FishLeg(net, likelihood=likelihood, lr=2.0, structure=structure)
        for _ in range(15):
            take(net, optimizer, likelihood.nll, x, y)
        return [p.detach() for p in net.parameters()], optimizer.diagnostics()["shortened_steps"]

    (small, bound), (large, same) = run(1e-3), run(1e3)
    assert bound == same > 3
    for a, b in zip(small, large, strict=True):
        assert relative(a, b) < 1e-6


@pytest.mark.parametrize(
    ("slope", "square", "curvature", "factor"),
    [
        (1.0, 1.0, 4.0, 0.25),
        (1.0, 1.0, 0.5, 1.0),
        (-1.0, 17.0, 4.0, 0.5),  # a standard error of 2, over five samples
        (0.0, 0.0, 4.0, 1.0),
        (1.0, 1.0, float("inf"), 1.0),
        (float("nan"), 1.0, 4.0, 1.0),
    ],
)
def test_the_factor(slope: float, square: float, curvature: float, factor: float) -> None:
    net, optimizer, likelihood, x, y = linear()
    likelihood.nll(y, net(x))
    assert optimizer._limit is not None
    told = torch.tensor([slope, square, curvature, 5.0, slope], dtype=torch.float64)
    assert float(optimizer._limit.factor(0, 1.0, lambda inputs, seed: told)) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("length", "batch", "given", "samples"),
    [
        (128, 16, "auto", 2),
        (300, 16, "auto", 1),
        (4, 16, "auto", 4),
        (1, 16, "auto", 4),
        (128, 16, 3, 3),
        (128, 16, None, 16),
    ],
)
def test_few_positions_do(length: int, batch: int, given: Any, samples: int) -> None:
    likelihood = CategoricalLikelihood(class_dim=-1)
    net = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7)).double()
    optimizer = FishLeg(net, likelihood=likelihood, curvature_batch=given)
    words = torch.arange(batch * length).reshape(batch, length) % 7
    take(net, optimizer, likelihood.nll, words, words)
    assert optimizer._limit is not None
    part = optimizer._limit._inputs()
    assert part.targets is not None and part.targets.shape == part.x.shape == (samples, length)


def test_it_resumes_bit_for_bit() -> None:
    def setup() -> tuple[nn.Module, FishLeg, CategoricalLikelihood]:
        net, likelihood = mlp(), CategoricalLikelihood()
        return net, FishLeg(net, likelihood=likelihood, lr=20.0), likelihood

    x, y = randn(20, 4), torch.arange(20) % 3
    net, optimizer, likelihood = setup()
    for _ in range(13):
        take(net, optimizer, likelihood.nll, x, y)
    state, weights = optimizer.state_dict(), {k: v.clone() for k, v in net.state_dict().items()}
    state = {
        **state,
        "state": {
            k: {n: t.clone() if isinstance(t, Tensor) else t for n, t in s.items()} for k, s in state["state"].items()
        },
    }
    again, resumed, other = setup()
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    for _ in range(13):
        take(net, optimizer, likelihood.nll, x, y)
        take(again, resumed, other.nll, x, y)
    assert resumed.diagnostics()["shortened_steps"] == optimizer.diagnostics()["shortened_steps"] > 0
    for a, b in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_before_loads() -> None:
    net, optimizer, likelihood, x, y = linear()
    take(net, optimizer, likelihood.nll, x, y)
    state = optimizer.state_dict()
    for name in ("limit_next", "limit_gap", "limit_streak", "limit_length", "limit_lr", "shortened_steps"):
        del state["param_groups"][0]["fishleg"][name]
    optimizer.load_state_dict(state)
    take(net, optimizer, likelihood.nll, x, y)
    assert optimizer.diagnostics()["shortened_steps"] == 1


def test_ignored_positions_do_not_count() -> None:
    def run(keep: bool) -> list[Tensor]:
        net, likelihood = mlp(), CategoricalLikelihood(class_dim=-1)
        optimizer = FishLeg(net, likelihood=likelihood, lr=1.0, curvature_batch=None, structure="diagonal", seed=3)
        x, y = randn(6, 4), torch.arange(6) % 3
        if not keep:
            y = torch.where(torch.arange(6) % 2 == 0, y, -100)
        found = []
        limit = optimizer._limit
        assert limit is not None
        likelihood.nll(y, net(x))
        inputs = optimizer._passes.inputs()
        vs = [randn(*p.shape) for p in net.parameters()]
        found += line(optimizer._passes, [*net.parameters()], [*net.parameters()], vs, inputs)
        want = torch.autograd.grad(likelihood.nll(y, net(x)), [*net.parameters()])
        assert float(found[0]) == pytest.approx(
            -sum(float((g * v).sum()) for g, v in zip(want, vs, strict=True)), rel=1e-9
        )
        return found

    some, everything = run(False), run(True)
    assert float(some[2]) != pytest.approx(float(everything[2]), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_parameters_of_other_dtypes(dtype: torch.dtype) -> None:
    net, likelihood = mlp().to(dtype), CategoricalLikelihood()
    optimizer = FishLeg(net, likelihood=likelihood, lr=30.0)
    x, y = randn(32, 4).to(dtype), torch.arange(32) % 3
    losses = [float(take(net, optimizer, likelihood.nll, x, y)) for _ in range(25)]
    assert optimizer.diagnostics()["shortened_steps"] > 5
    assert losses[-1] < losses[0]


def test_frozen_and_unused_parameters_stay() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.idle = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(2, 2)
            self.a.bias.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh())

    net, likelihood = seeded(Net), GaussianLikelihood()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = FishLeg(net, likelihood=likelihood, lr=20.0)
    for _ in range(3):
        take(net, optimizer, likelihood.nll, randn(8, 4), randn(8, 3))
    assert optimizer.diagnostics()["shortened_steps"] > 0
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"a.weight", "b.weight", "b.bias"}


@pytest.mark.parametrize("error", [RuntimeError("the model's own"), KeyboardInterrupt()])
def test_a_pass_that_fails_leaves_the_step_as_it_was(error: BaseException) -> None:
    def run(limit: float | None) -> list[Tensor]:
        net, optimizer, likelihood, x, y = linear(step_limit=limit)
        if limit is not None:
            assert optimizer._limit is not None

            def fails(*args: Any) -> Tensor:
                raise error

            optimizer._limit.factor = fails  # type: ignore[method-assign]
            with pytest.raises(type(error)):
                take(net, optimizer, likelihood.nll, x, y)
        else:
            take(net, optimizer, likelihood.nll, x, y)
        return [p.detach() for p in net.parameters()]

    for a, b in zip(run(1.0), run(None), strict=True):
        assert torch.equal(a, b)


def test_a_perfect_fit_moves_as_lr_says() -> None:
    """Slope and error are zero, and so is what is divided by them."""
    net, optimizer, likelihood, x, _ = linear(lr=0.1)
    y = net(x).detach()
    take(net, optimizer, likelihood.nll, x, y)
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_a_likelihood_lets_go_of_targets_where_it_is_copied() -> None:
    import copy
    import pickle

    likelihood = CategoricalLikelihood()
    likelihood.nll(torch.arange(3), torch.zeros(3, 3, requires_grad=True))
    assert likelihood.noted is not None
    for other in (copy.deepcopy(likelihood), pickle.loads(pickle.dumps(likelihood))):
        assert other.noted is None and other.class_dim == likelihood.class_dim


def test_evaluation_and_transforms_are_not_noted() -> None:
    likelihood, outputs = CategoricalLikelihood(), torch.zeros(3, 3, requires_grad=True)
    with torch.no_grad():
        likelihood.nll(torch.arange(3), outputs)
    likelihood.nll(torch.arange(3), outputs.detach())
    torch.func.grad(partial(likelihood.nll, torch.arange(3)))(outputs)
    assert likelihood.noted is None


@pytest.mark.parametrize("limit", [0.0, -1.0, float("inf"), float("nan"), "1", True])
def test_wrong_limits(limit: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="step_limit should be"):
        FishLeg(mlp(), likelihood=CategoricalLikelihood(), step_limit=limit)
