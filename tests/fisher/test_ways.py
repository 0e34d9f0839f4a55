"""F v by another way where one fails: forward mode is checked, and nothing that passes is given up for good."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fishleg_fast import FishLeg, GaussianLikelihood
from fishleg_fast.algebra.matrix import dense
from fishleg_fast.fisher import products
from fishleg_fast.passes.isolated import IsolatedPasses
from support.dense import explicit_fisher, flat, randn, relative, split_like
from support.low_rank_case import Case
from support.unseen import Unseen

X = randn(6, 6, seed=1)


class Net(nn.Module):
    """Two layers, between which ``call(hidden, self)`` is computed."""

    def __init__(self, call: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.call = nn.Linear(6, 6), nn.Linear(6, 5), call

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.call(self.a(x), self)))


def normed(h: Tensor, net: Any) -> Tensor:
    with torch.no_grad():
        scale = h.norm(dim=1, keepdim=True)
    return h / scale


def teacher(h: Tensor, net: Any) -> Tensor:
    with torch.no_grad():
        other = net.a(h)
    return h * other


def centred(h: Tensor, net: Any) -> Tensor:
    """Zero, but with a gradient."""
    with torch.no_grad():
        same = h.sin()
    return h.sin() - same


def disabled(h: Tensor, net: Any) -> Tensor:
    with torch.set_grad_enabled(False):
        mask = torch.softmax(h, 1)
    return h + mask


class Wrong(torch.autograd.Function):
    """x², with the tangent of 2 x²."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g

    @staticmethod
    def jvp(ctx, t):
        return 4 * ctx.saved_tensors[0] * t


class Opaque(torch.autograd.Function):
    """x², with a gradient alone."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Hiding(Opaque):
    """... which drops out of a second derivative without a word."""

    @staticmethod
    def backward(ctx, g):
        return (2 * ctx.saved_tensors[0] * g).detach()


DIFFERS = {
    "no_grad": normed,
    "a teacher": teacher,
    "zero": centred,
    "set_grad_enabled": disabled,
    "a wrong jvp": lambda h, net: Wrong.apply(h),
}
FIRST_ALONE = {
    "cdist": lambda h, net: torch.cdist(h, net.a.weight),
    "once differentiable": lambda h, net: Opaque.apply(h),
    "hiding": lambda h, net: Hiding.apply(h),
}


def passes_of(net: nn.Module) -> IsolatedPasses:
    return IsolatedPasses(net, None, None, GaussianLikelihood(0.5), [X], 0)


def product(passes: IsolatedPasses, name: str = "ggn", seed: int = 2) -> Tensor:
    params = list(passes.model.parameters())
    v = randn(sum(p.numel() for p in params), seed=seed)
    with torch.no_grad():
        return flat(products.FISHER[name](passes, params, split_like(v, params), passes.inputs()))


def exact(net: nn.Module, seed: int = 2) -> Tensor:
    F = explicit_fisher(net, X, "gaussian", 0.5)
    return F @ randn(len(F), seed=seed)


@pytest.mark.parametrize("name", DIFFERS)
def test_forward_mode_is_taken_where_it_is_what_backward_is(name: str) -> None:
    net = Net(DIFFERS[name]).double()
    passes = passes_of(net)
    with pytest.warns(UserWarning, match="differentiates twice from here on, since forward mode failed"):
        assert relative(product(passes), exact(net)) <= 1e-10
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        for seed in range(12):
            assert relative(product(passes, seed=seed), exact(net, seed)) <= 1e-10


@pytest.mark.parametrize("name", DIFFERS)
def test_low_rank_products_are_checked_too(name: str) -> None:
    case = Case(Net(DIFFERS[name]))
    assert True in case.low_rank()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(5):
            for x, y in zip(case.both()[0], case.explicit("gaussian"), strict=True):
                assert relative(dense(x), y) <= 1e-10


@pytest.mark.parametrize("name", list(products.FISHER))
def test_hooks_on_gradients_are_no_part_of_the_fisher_matrix(name: str) -> None:
    """They see the gradients that are trained on, and no others."""
    net = Net(lambda h, net: h.sin()).double()
    want, calls = product(passes_of(net), name), Unseen()
    handle = net.a.weight.register_hook(lambda g: (calls.append(1), 2 * g)[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(product(passes_of(net), name), want) and not len(calls)
    net(X).sum().backward()
    hooked = net.a.weight.grad.clone()
    assert len(calls) == 1
    handle.remove()
    net.zero_grad()
    net(X).sum().backward()
    assert torch.equal(hooked, 2 * net.a.weight.grad) and len(calls) == 1


def test_what_depends_on_the_mode_is_checked_again_with_it() -> None:
    net = Net(lambda h, net: h.sin() if net.training else normed(h, net)).double()
    passes = passes_of(net)
    for _ in range(40):
        product(passes)
    assert relative(product(passes), exact(net)) <= 1e-10
    net.eval()
    with pytest.warns(UserWarning, match="differentiates twice"):
        assert relative(product(passes), exact(net)) <= 1e-10
    net.train()
    assert relative(product(passes), exact(net)) <= 1e-10
    assert passes.attempts("ggn", "forward mode").due(passes.mode())  # and taken again


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_scripted_functions_that_lose_tangents() -> None:
    @torch.jit.script
    def scripted(h: Tensor) -> Tensor:
        return torch.sigmoid(h * 2.0) * h + torch.relu(h)

    net = Net(lambda h, net: scripted(h)).double()
    passes = passes_of(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(10):
            net(X).sum().backward()
            assert relative(product(passes, seed=seed), exact(net, seed)) <= 1e-10


@pytest.mark.parametrize("name", FIRST_ALONE)
def test_first_derivatives_alone_are_enough(name: str) -> None:
    net = Net(FIRST_ALONE[name]).double()
    passes = passes_of(net)
    with pytest.warns(UserWarning, match="takes differences of the model's outputs") as told:
        assert relative(product(passes), exact(net)) <= 1e-7
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(6):
            assert relative(product(passes, seed=seed), exact(net, seed)) <= 1e-7


def test_differences_see_one_network() -> None:
    """Dropout and running statistics are the same on both sides."""
    net = Net(lambda h, net: nn.functional.dropout(torch.cdist(h, net.a.weight), 0.5)).double()
    passes, v = passes_of(net), 1e-3
    sizes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sizes = [float(product(passes).norm()) for _ in range(8)]
    assert max(sizes) <= 100 * float(exact(net).norm()) and v


@pytest.mark.parametrize("name", FIRST_ALONE)
def test_hessian_by_differences_of_gradients(name: str) -> None:
    net = Net(FIRST_ALONE[name]).double()
    passes, other = passes_of(net), passes_of(net)
    with pytest.warns(UserWarning, match="fisher='hessian' is 'antithetic' from here on") as told:
        found = product(passes, "hessian")
    assert len(told) == 1 and torch.equal(found, product(other, "antithetic"))


# What passes is not given up for good


class Failing:
    """Raises while ``on``."""

    def __init__(self, error: Exception) -> None:
        self.error, self.on = error, False

    def __call__(self, h: Tensor, net: Any) -> Tensor:
        if self.on and torch._C._is_fwd_grad_enabled() and torch.autograd.forward_ad._current_level >= 0:
            raise self.error
        return h.sin()


@pytest.mark.parametrize("error", [RuntimeError("another thread's"), torch.OutOfMemoryError("no memory")])
def test_a_failure_in_passing_is_forgotten(error: Exception) -> None:
    fail = Failing(error)
    case = Case(Net(fail))
    case.both()
    fail.on = True
    for _ in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                case.both()
            except torch.OutOfMemoryError:
                assert isinstance(error, torch.OutOfMemoryError)
    fail.on = False
    for _ in range(8):
        found = case.both()[0]
    assert sum(not isinstance(x, Tensor) for x in found) == sum(case.low_rank())
    assert not case.optimizer._passes.attempts("ggn", "low rank").failures
    assert not case.optimizer._passes.attempts("ggn", "forward mode").failures


def test_a_fault_of_the_model_s_own_is_held_against_no_way() -> None:
    net = Net(lambda h, net: h.sin()).double()
    passes = passes_of(net)
    net.call = lambda h, net: (_ for _ in ()).throw(RuntimeError("of the model"))
    for _ in range(5):
        with pytest.raises(RuntimeError, match="of the model"):
            product(passes)
    net.call = lambda h, net: h.sin()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative(product(passes), exact(net)) <= 1e-10


# Functions of the user's that differentiate by their inputs


def residual(net: nn.Module, x: Tensor) -> Tensor:
    """u″ + sin x"""
    x = x.detach().requires_grad_()
    (du,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    (d2,) = torch.autograd.grad(du.sum(), x, create_graph=True)
    return d2 + torch.sin(x)


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    """A critic's outputs beside the norms of their gradients."""
    x = x.detach().requires_grad_()
    out = net(x)
    (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return torch.cat([out, dx.square().sum(1, keepdim=True)], 1)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("function", [residual, penalty])
@pytest.mark.parametrize("fisher", ["ggn", "hessian", "antithetic", "rank1"])
def test_labels_may_be_drawn_with_gradients(function: Callable, fisher: str, wrapped: bool) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return function(self.net, x)

    net, likelihood = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)), GaussianLikelihood()
    own: tuple = () if wrapped else (
        lambda model, x: likelihood.draw(function(model, x)),
        lambda model, x, y: likelihood.nll(y, function(model, x)),
    )  # fmt: skip
    if not wrapped and fisher == "ggn":
        return
    model = Wrapped() if wrapped else net
    optimizer = FishLeg(model, *own, likelihood=likelihood if wrapped else None, fisher=fisher, update_aux_every=1)
    for _ in range(3):
        out = function(net, torch.rand(40, 1)) if not wrapped else model(torch.rand(40, 1))
        optimizer.zero_grad()
        likelihood.nll(torch.zeros_like(out), out).backward()
        optimizer.step()
    assert optimizer.diagnostics()["aux_steps"] == 3 and not optimizer.diagnostics()["skipped_steps"]
