"""Activation checkpointing, under which modules run once more during a backward pass, leaves forward mode as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from fishleg_fast import CategoricalLikelihood
from fishleg_fast.algebra.matrix import dense
from fishleg_fast.fisher.products import ggn
from fishleg_fast.passes.isolated import IsolatedPasses
from support.dense import randn, relative
from support.low_rank_case import EXACT, Case

Call = Callable[["Net", Tensor], Tensor]


def again(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    return checkpoint(function, *args, use_reentrant=False)


WAYS: dict[str, Call] = {
    "a module": lambda net, x: net.c(again(net.b, net.a(x))),
    "a function": lambda net, x: net.c(again(lambda h: net.b(h) + h, net.a(x))),
    "a parameter": lambda net, x: net.c(again(lambda h, w: torch.sin(h @ w.T), net.a(x), net.b[0].weight)),
    "the first layer": lambda net, x: net.c(net.b(again(net.a, x))),
    "all of it": lambda net, x: again(lambda x: net.c(net.b(net.a(x))), x),
    "twice": lambda net, x: net.c(again(net.b, again(net.b, net.a(x)))),
    "one in another": lambda net, x: net.c(again(lambda h: again(net.b, h) * h, net.a(x))),
    "segments": lambda net, x: net.c(checkpoint_sequential(net.b, 2, net.a(x), use_reentrant=False)),
    "to the end": lambda net, x: net.c(checkpoint(net.b, net.a(x), use_reentrant=False, early_stop=False)),
}


class Net(nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c, self.call = nn.Linear(6, 8), nn.Linear(8, 3), call
        self.b = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 8), nn.LayerNorm(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nothing is checkpointed."""
    monkeypatch.setitem(globals(), "checkpoint", lambda f, *args, **_: f(*args))
    monkeypatch.setitem(globals(), "checkpoint_sequential", lambda f, segments, x, **_: f(x))


@pytest.mark.filterwarnings("error:fisher=")
@pytest.mark.parametrize("name", WAYS)
def test_products_are_those_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for checkpointed in (True, False):
        if not checkpointed:
            plain(monkeypatch)
        net = Net(WAYS[name]).double()
        passes = IsolatedPasses(net, None, None, CategoricalLikelihood(), None, 0)
        net(randn(20, 6))
        params = list(net.parameters())
        vs = [randn(*p.shape, seed=k) for k, p in enumerate(params)]
        for _ in range(6):  # of which some are checked
            found.append(ggn(passes, params, vs, passes.inputs()))
        assert passes.checkpointed == checkpointed
        assert not passes.attempts("ggn", "forward mode").failures
    for with_, without in zip(found[:6], found[6:], strict=True):
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(with_, without, strict=True))


@pytest.mark.filterwarnings("error:fisher=")
@pytest.mark.parametrize("name", WAYS)
def test_low_rank_products_are_those_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(WAYS[name])
    net.b[2].p = 0.0
    other = copy.deepcopy(net)
    case = Case(net, CategoricalLikelihood())
    vs, learner = case.vs(), case.optimizer._learner
    with torch.no_grad():
        usual = [learner._fisher_product(case.blocks, vs) for _ in range(6)]
    assert any(not isinstance(x, Tensor) for products in usual for x in products)
    assert learner.passes.checkpointed or name == "the first layer"  # of which low-rank products need no more
    assert not learner.passes.attempts("ggn", "low rank").failures
    plain(monkeypatch)
    want = Case(other, CategoricalLikelihood())
    assert [b.shape for b in want.blocks] == [b.shape for b in case.blocks]
    with torch.no_grad():
        products = want.optimizer._learner._dense_fisher_product(want.blocks, vs, want.optimizer._passes.inputs())
    for found in usual:
        assert max(relative(dense(a), b) for a, b in zip(found, products, strict=True)) < EXACT
