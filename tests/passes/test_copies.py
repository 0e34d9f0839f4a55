"""Copies of a model that an optimizer sees compute with their own parameters, however they are made."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fishleg_fast import FishLeg, GaussianLikelihood

LIKELIHOOD = GaussianLikelihood()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, 2))
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        return self.layer(x @ self.w) + shift


class Stateful(Net):
    """With a state of its own for copies and pickles."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "copied": True}


class Slotted(Net):
    __slots__ = ("extra",)


def shallow(net: nn.Module) -> nn.Module:
    twin = copy.copy(net)
    twin.__dict__.update({name: dict(twin.__dict__[name]) for name in ("_parameters", "_modules")})
    return twin


def pickled(net: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def replica(net: nn.Module) -> nn.Module:
    """As DataParallel makes them: first of all modules, then their children and parameters are set."""
    twin = net._replicate_for_data_parallel()
    twin.layer = net.layer._replicate_for_data_parallel()
    for name in ("weight", "bias"):
        setattr(twin.layer, name, getattr(net.layer, name).detach())
    return twin


WAYS = {"shallow": shallow, "deep": copy.deepcopy, "pickled": pickled, "replica": replica}


@pytest.mark.parametrize("kind", [Net, Stateful, Slotted])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("call", [lambda m, *a, **k: m(*a, **k), lambda m, *a, **k: m.forward(*a, **k)])
def test_a_copy_computes_with_its_own_parameters(kind: type[Net], way: str, call: Callable) -> None:
    net = kind()
    optimizers = [FishLeg(net, likelihood=LIKELIHOOD) for _ in range(2)]
    before = dict(net.__dict__)
    twin = WAYS[way](net)
    if way == "replica":
        twin.w = torch.zeros(4, 2)
    else:
        twin.w = nn.Parameter(torch.zeros(4, 2))
        assert "forward" not in twin.__dict__ and "__getstate__" not in twin.__dict__
    x = torch.ones(3, 4)
    want = net.layer.bias.expand(3, 2) + 0.5
    assert torch.equal(call(twin, x, shift=0.5), want) and not torch.equal(call(net, x, shift=0.5), want)
    assert type(twin) is kind and getattr(twin, "copied", False) == (kind is Stateful and way != "replica")
    assert net.__dict__ == before
    del optimizers
    gc.collect()
    assert not {"forward", "__getstate__", "_replicate_for_data_parallel"} & set(net.__dict__)


def test_what_replicas_are_given_is_seen() -> None:
    """DataParallel around a model that an optimizer has: only its replicas' forward is called."""
    net = Net()
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, update_aux_every=1)
    for step in range(2):
        x = torch.randn(6 + step, 4)
        optimizer.zero_grad()
        twin = replica(net)
        twin.w = net.w.view_as(net.w)  # as Broadcast has it, on the graph
        twin.layer.weight = net.layer.weight.view_as(net.layer.weight)
        LIKELIHOOD.nll(torch.ones(6 + step, 2), twin(x)).backward()
        assert torch.equal(optimizer._passes.tap.last.args[0], x)
        optimizer.step()
    assert optimizer.diagnostics()["aux_steps"] == 2
    gone = weakref.ref(twin)
    del twin
    assert gone() is None  # at once: it holds a copy of all parameters


def test_a_replica_elsewhere_is_not_seen() -> None:
    net = Net()
    optimizer = FishLeg(net, likelihood=LIKELIHOOD)
    twin = replica(net)
    twin.w = net.w.to("meta")
    twin.layer.weight, twin.layer.bias = net.layer.weight.to("meta"), net.layer.bias.to("meta")
    assert twin(torch.ones(3, 4, device="meta")).is_meta
    assert optimizer._passes.tap.last is None


def test_another_librarys_forward_stays() -> None:
    net = Net()
    net.forward = lambda x: x[:, :2] * 0 + 7  # as accelerate, for one, does
    optimizer = FishLeg(net, likelihood=LIKELIHOOD)
    for twin in (net._replicate_for_data_parallel(), copy.copy(net)):
        assert (twin(torch.ones(3, 4)) == 7).all()
    del optimizer
    gc.collect()
    assert (net(torch.ones(3, 4)) == 7).all() and "__getstate__" not in net.__dict__


EXPORTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "trace": lambda net, x: torch.jit.trace(net, x)(x),
    "export": lambda net, x: torch.export.export(net, (x,)).module()(x),
    "fx": lambda net, x: torch.fx.symbolic_trace(net)(x),
    "compile": lambda net, x: torch.compile(net, backend="eager", fullgraph=True)(x),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("build", [Net, lambda: nn.Sequential(nn.Linear(4, 2), nn.Tanh())])
@pytest.mark.parametrize("way", EXPORTS)
def test_a_model_is_exported_while_an_optimizer_has_it(way: str, build: Callable[[], nn.Module]) -> None:
    torch._dynamo.reset()
    net, x = build(), torch.randn(3, 4)
    optimizer = FishLeg(net, likelihood=LIKELIHOOD)
    torch.testing.assert_close(EXPORTS[way](net, x), net(x))
    with pytest.raises(AttributeError, match=r"jit\.script takes a model before its optimizer is made, or when"):
        torch.jit.script(net)
    del optimizer
    gc.collect()
    torch.testing.assert_close(torch.jit.script(net)(x), net(x))
