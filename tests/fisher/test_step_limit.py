"""Steps end where the loss's quadratic model has its minimum: against dense matrices, and on problems that are one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from fishleg_fast import BernoulliLikelihood, CategoricalLikelihood, FishLeg, GaussianLikelihood, Likelihood
from fishleg_fast.fisher.step_limit import line
from support.dense import randn, relative


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double()


def mlp(outputs: int = 3) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)))


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


def linear(**settings: Any) -> tuple[nn.Linear, FishLeg, GaussianLikelihood, Tensor, Tensor]:
    """A loss that is its own quadratic model."""
    likelihood = GaussianLikelihood()
    net = seeded(lambda: nn.Linear(4, 2))
    settings = {"lr": 50.0, "curvature_batch": None, **settings}
    return net, FishLeg(net, likelihood=likelihood, **settings), likelihood, randn(12, 4), randn(12, 2)


def take(net: nn.Module, optimizer: FishLeg, nll: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = nll(y, net(x))
    loss.backward()
    optimizer.step()
    return loss.detach()


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
    told = tuple(torch.tensor(v, dtype=torch.float64) for v in (slope, square, curvature, 5.0, slope))
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


class Watched:
    """A training of one sample's fit, and which of its steps are measured."""

    def __init__(self, lr: float, **settings: Any) -> None:
        self.net, self.optimizer, self.likelihood, self.x, self.y = linear(lr=lr, **settings)
        self.steps: list[int] = []
        assert self.optimizer._limit is not None
        self.limit = self.optimizer._limit
        self._factor, self.limit.factor = self.limit.factor, self.factor  # type: ignore[method-assign]

    def factor(self, step: int, lr: float, measured: Any) -> Tensor:
        self.steps.append(step)
        return self._factor(step, lr, measured)

    def take(self, steps: int = 1, lr: float | None = None) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] if lr is None else lr
        for _ in range(steps):
            take(self.net, self.optimizer, self.likelihood.nll, self.x, self.y)

    def believe(self, length: float) -> None:
        """As if the latest step had been of that length in those of the limit, and the next ones were not due."""
        self.limit._read()
        self.limit._length, self.limit._next = length, 1000

    def step(self, lr: float) -> list[Tensor]:
        before = [p.detach().clone() for p in self.net.parameters()]
        self.take(lr=lr)
        return [p.detach() - b for p, b in zip(self.net.parameters(), before, strict=True)]


def test_steps_near_the_limit_are_measured_up_to_every_fourth() -> None:
    training = Watched(50.0)
    training.take()
    for _ in range(60):  # the loss's own minimum is near: of other targets each time it is as far as ever
        training.y = training.y.neg()
        training.take()
    assert training.steps[:2] == [0, 1] and 4 in {b - a for a, b in pairwise(training.steps)}
    assert max(b - a for a, b in pairwise(training.steps)) == 4


def test_steps_far_from_it_ever_more_rarely() -> None:
    training = Watched(1e-6)
    training.take(30)
    assert training.steps == [0, 1, 3, 7, 15, 25]


@pytest.mark.parametrize(
    ("before", "found", "risen", "gap", "streak", "then"),
    [
        (2.0, 2.9, 1.0, 1, 1, 1),
        (2.0, 2.9, 1.0, 1, 2, 2),
        (2.0, 1.4, 1.0, 3, 8, 4),
        (2.0, 1.4, 1.0, 4, 30, 4),
        (2.0, 1.2, 1.0, 4, 30, 1),  # shorter than foretold
        (2.0, 3.1, 1.0, 4, 30, 1),  # longer
        (2.0, 3.1, 1.9, 2, 5, 3),  # as lr has it
        (1.0, 1.2, 0.2, 2, 5, 1),
        (0.4, 0.3, 1.0, 4, 9, 8),
        (0.1, 0.3, 1.0, 8, 3, 10),  # well within is well within
        (0.1, 0.49, 1.0, 10, 4, 2),
        (0.1, 0.6, 1.0, 10, 4, 1),
        (2.0, 0.0, 1.0, 4, 9, 1),  # it was not known
    ],
)
def test_when_the_next_measurement_is(
    before: float, found: float, risen: float, gap: int, streak: int, then: int
) -> None:
    limit = linear()[1]._limit
    assert limit is not None
    limit._length, limit._lr, limit._gap, limit._streak = before, 0.1, gap, streak
    limit._unread = 30, torch.tensor(found), 0.1 * risen
    state = limit.state()
    assert (state["limit_next"], state["limit_gap"]) == (30 + then, then)
    assert state["shortened_steps"] == (found > 1) and state["limit_streak"] in (0, streak + 1)


def test_the_first_measurement_foretells_nothing() -> None:
    limit = linear()[1]._limit
    assert limit is not None
    limit._unread = 0, torch.tensor(0.4), 1.0
    assert limit.state()["limit_next"] == 1


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}, {"backend": "reference"}])
def test_steps_between_measurements_are_taken_for_as_long_as_the_latest(settings: dict[str, Any]) -> None:
    (held, free), report = (Watched(1.0, **settings) for _ in range(2)), []
    for training, length in ((held, 4.0), (free, 0.5)):
        training.take()
        assert training.limit is not None
        with torch.no_grad():
            for p in training.net.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape))
        training.believe(length)
        training.limit._lr = 1.0
    for lr, factor in ((1.0, 0.25), (2.0, 0.125), (0.5, 0.5), (0.25, 1.0), (0.1, 1.0)):
        whole, part = free.step(lr), held.step(lr)
        for a, b in zip(whole, part, strict=True):
            assert relative(b, factor * a) < 1e-12
        report.append(held.optimizer.diagnostics()["step_scale"])
        with torch.no_grad():
            for p, q in zip(held.net.parameters(), free.net.parameters(), strict=True):
                p.copy_(q)
    assert report == [0.25, 0.125, 0.5, 1.0, 1.0]
    assert held.optimizer.diagnostics()["shortened_steps"] - free.optimizer.diagnostics()["shortened_steps"] == 3
    assert held.steps == free.steps == [0]


@pytest.mark.parametrize("told", ["nll", "gradient"])
def test_a_step_of_an_lr_that_has_risen_is_measured(told: str) -> None:
    likelihood, net, x, y = CategoricalLikelihood(), mlp(), randn(16, 4), torch.arange(16) % 3
    optimizer = FishLeg(net, likelihood=likelihood, lr=1e-5)
    nll = likelihood.nll if told == "nll" else lambda y, o: F.cross_entropy(o, y)
    for _ in range(15):
        take(net, optimizer, nll, x, y)
    assert optimizer.diagnostics()["shortened_steps"] == 0
    optimizer.param_groups[0]["lr"] = 100.0
    for _ in range(3):
        take(net, optimizer, nll, x, y)
    assert optimizer.diagnostics()["shortened_steps"] == 3


def test_targets_that_are_no_longer_known_end_the_holding() -> None:
    training = Watched(50.0)
    training.take(3)
    training.likelihood.nll = lambda y, o: F.mse_loss(o, y)  # type: ignore[method-assign]
    training.take(8)
    assert training.optimizer.diagnostics()["step_scale"] is None


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
