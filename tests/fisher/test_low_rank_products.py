"""F v of low-rank v: that of the dense route and of the explicit Fisher matrix, or not taken; nothing stays behind."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

from fishleg_fast import BernoulliLikelihood, CategoricalLikelihood, GaussianLikelihood
from fishleg_fast.algebra.matrix import dense
from support.dense import randn
from support.low_rank_case import Case, check, custom, mlp


class NoForward(torch.autograd.Function):
    """tanh, with two derivatives but none forward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * (1 - torch.tanh(x) ** 2)


def changed(change: Callable[[nn.Sequential], object], net: nn.Sequential | None = None) -> nn.Sequential:
    net = net or mlp()
    change(net)
    return net


def doubled(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return 2 * torch.sin(output)


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5))
    net[2].weight = net[0].weight
    return net


def frozen(name: str) -> Callable[[nn.Module], nn.Module]:
    def change(net: nn.Sequential) -> None:
        getattr(net[0], name).requires_grad_(False)

    return changed(change)


FIRST_DENSE, LOW_RANK = [False, True], [True, True]
MODELS: dict[str, tuple] = {  # which gradients are low-rank, the model, and what Case is given besides
    "plain": (LOW_RANK, mlp),
    "no bias": (LOW_RANK, lambda: mlp(bias=False)),
    "one position": (LOW_RANK, mlp, {"shape": (1, 6)}),
    "time": (LOW_RANK, mlp, {"shape": (2, 2, 6)}),
    "no batch": (LOW_RANK, mlp, {"shape": (6,)}),
    "in-place ReLU": (LOW_RANK, lambda: mlp(activation=nn.ReLU(inplace=True))),
    "used twice": (LOW_RANK, lambda: custom(lambda f, x: f(torch.sin(f(x)))), {"shape": (2, 6)}),
    "used twice at once": (LOW_RANK, lambda: custom(lambda f, x: f(x) * f(2 * x)), {"shape": (2, 6)}),
    "some calls without rows": (LOW_RANK, lambda: custom(lambda f, x: f(x) + f(x[:0]).sum())),
    "hook before": (LOW_RANK, lambda: changed(lambda net: net[0].register_forward_hook(doubled))),
    "hook after": (LOW_RANK, mlp, {"after": lambda net: net[0].register_forward_hook(doubled)}),
    "hook in front": (FIRST_DENSE, mlp, {"after": lambda net: net[0].register_forward_hook(doubled, prepend=True)}),
    "pre-hook": (LOW_RANK, lambda: changed(lambda net: net[0].register_forward_pre_hook(lambda m, a: torch.sin(a[0])))),
    "checkpoint": (LOW_RANK, lambda: custom(lambda f, x: checkpoint(f, x, use_reentrant=False))),
    "weight used elsewhere": (FIRST_DENSE, lambda: custom(lambda f, x: f(x) + torch.sin(x) @ f.weight)),
    "tied": (None, tied),
    "frozen weight": (None, lambda: frozen("weight")),
    "frozen bias": (LOW_RANK, lambda: frozen("bias")),
    "parametrized later": (
        FIRST_DENSE,
        mlp,
        {"after": lambda net: register_parametrization(net[0], "weight", nn.Softplus())},
    ),
    "norm and bare parameter": (None, lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5))),
    "other structures": (None, mlp, {"structure": {"0": "diagonal", "2": "sumkron"}}),
    "adapter": (LOW_RANK, lambda: custom(lambda f, x: f(x) + torch.sin(x))),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_all_kinds(name: str) -> None:
    expected, build, *rest = MODELS[name]
    case = Case(build(), **(rest[0] if rest else {}))
    assert expected in (None, case.low_rank())
    check(case)


@pytest.mark.parametrize("name", ["plain", "time", "used twice"])
@pytest.mark.parametrize("kind", ["bernoulli", "categorical", "learned sigma"])
def test_likelihoods(kind: str, name: str) -> None:
    """A noise level of the likelihood's own is a block among the others."""
    likelihoods = {"bernoulli": BernoulliLikelihood(), "learned sigma": GaussianLikelihood(0.5, learn=True)}
    _, build, *rest = MODELS[name]
    case = Case(build(), likelihoods.get(kind, CategoricalLikelihood()), **(rest[0] if rest else {}))
    assert True in case.low_rank() and (kind == "learned sigma") == (case.blocks[-1].shape == (1, 1))
    check(case, explicit=None if kind == "learned sigma" else kind)


@pytest.mark.parametrize("size", [2, None])
def test_batches_of_a_loader(size: int | None) -> None:
    """Other inputs than those of the gradient, and fewer of them."""
    case = Case(mlp(), aux_loader=[(randn(4, 6, seed=9),)], curvature_batch=size)
    case.x = randn(4, 6, seed=9)[:size]
    check(case)


# Where the low-rank route cannot be taken


def test_what_was_tried_leaves_no_trace_in_batches_and_seeds() -> None:
    """After a failure the dense route meets the batch and the seeds that it would have met, now and later."""
    found = []
    for low_rank_mode in (True, False):
        loader = [(randn(4, 6, seed=k),) for k in range(3)]
        net = custom(lambda f, x: nn.functional.dropout(NoForward.apply(f(x))))
        torch.manual_seed(0)
        for p in net.parameters():
            nn.init.normal_(p)
        case = Case(net, aux_loader=loader)
        if not low_rank_mode:
            case.optimizer._passes.attempts("ggn", "low rank")._left_out = 99
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            found.append(
                [dense(x) for _ in range(3) for x in case.optimizer._learner._fisher_product(case.blocks, case.vs())]
            )
    assert all(map(torch.equal, *found))


class Hidden(nn.Module):
    """Two layers, the first of which ``hide`` calls as soon as ``hiding``: in passes for the curvature alone."""

    def __init__(self, hide: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.hide, self.hiding = nn.Linear(6, 6), nn.Linear(6, 5), hide, False

    def forward(self, x: Tensor) -> Tensor:
        h = self.hide(self.a, x) if self.hiding else self.a(x)
        return self.b(torch.tanh(h))


HIDES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "functional": lambda f, x: nn.functional.linear(x, f.weight, f.bias),
    "forward": lambda f, x: f.forward(x),
    "named argument": lambda f, x: f(input=x),
    "and a named argument": lambda f, x: f(x) + f(input=torch.sin(x)),
    "not called": lambda f, x: x,
    "called in vain": lambda f, x: (f(x), x)[1],
}


@pytest.mark.parametrize("name", HIDES)
def test_a_layer_that_hides(name: str) -> None:
    case = Case(Hidden(HIDES[name]))
    assert case.low_rank() == LOW_RANK
    case.net.hiding = True
    check(case, taken=False)


def detached(f: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return f(x)


DISABLED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "no_grad": detached,
    "one call": lambda f, x: f(x) + torch.sin(detached(f, 2 * x)),
    "reentrant": lambda f, x: checkpoint(f, x.requires_grad_(), use_reentrant=True),
    "one call, reentrant": lambda f, x: f(x) + checkpoint(f, (2 * x).requires_grad_(), use_reentrant=True),
}


@pytest.mark.parametrize("name", DISABLED)
def test_a_layer_called_with_gradients_disabled(name: str) -> None:
    """Which of these it is does not show; the dense route's result is taken for it, whatever that is."""
    case = Case(Hidden(DISABLED[name]))
    case.net.hiding = True
    check(case, taken=False, explicit=None)


def test_outputs_that_depend_on_nothing() -> None:
    case = Case(Hidden(lambda f, x: f(x)))
    case.net.b.register_forward_hook(lambda module, args, output: output.detach())
    check(case, taken=False, explicit=None)
    assert not any(dense(x).any() for x in case.both()[0])


WITHOUT: dict[str, Callable[[], nn.Module]] = {
    "the user's own": lambda: custom(lambda f, x: NoForward.apply(f(x))),
    "weight_norm": lambda: custom(lambda f, x: f(x), first=parametrizations.weight_norm(nn.Linear(6, 6))),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_an_operation_without_a_forward_derivative(name: str) -> None:
    """... makes it the dense route, which says so once."""
    case = Case(WITHOUT[name]())
    assert case.low_rank()[-1]
    check(case, taken=False)
    with pytest.warns(UserWarning, match="differentiates twice from here on"):
        case.optimizer._diagnostics.warn(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(case, taken=False)
        case.optimizer._diagnostics.warn(1)


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_model_that_fails_is_left_as_it_was(where: str, kind: type[BaseException]) -> None:
    """The error is the user's own, and the next product is as it should be."""

    def fail(*args: object) -> None:
        raise kind("of the model")

    case = Case(Hidden(lambda f, x: f(x)))
    tensors, hooks = case.kept()

    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        if where == "forward":
            fail()
        output.register_hook(fail)

    handle = case.net.b.register_forward_hook(hook)
    with pytest.raises(kind, match="of the model"):
        case.both()
    handle.remove()
    after, left = case.kept()
    assert left == hooks and all(map(torch.equal, tensors, after))
    assert not any(p.grad_fn is not None for p in case.net.parameters())
    check(case)
