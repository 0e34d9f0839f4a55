"""Models that write to their inputs: passes of the optimizer start from what the user's pass was given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fishleg_fast import FishLeg, GaussianLikelihood
from fishleg_fast.fisher.products import FISHER
from support.dense import randn
from support.unseen import Unseen

LIKELIHOOD = GaussianLikelihood()


def x(k: int = 0) -> Tensor:
    return randn(40, 6, seed=k).float()


def write_row(x: Tensor) -> Tensor:
    x[:, 0] = x[:, 1] + 1
    return x


def write_cache(x: Tensor, cache: Tensor) -> Tensor:
    cache[0] += 1
    return x * cache.mean()


WRITES: dict[str, tuple[Callable[..., Tensor], Callable[[], tuple]]] = {
    "arithmetic": (lambda x: x.sub_(1.0).mul_(3.0), lambda: (x(),)),
    "an index": (write_row, lambda: (x(),)),
    "a view": (lambda x: (x.view(-1).add_(1.0), x)[1], lambda: (x(),)),
    "nested": (lambda d: d["x"][0].mul_(2.0).add_(1.0), lambda: ({"x": [x()]},)),
    "a cache": (write_cache, lambda: (x(), torch.ones(3))),
    "nothing": (lambda x: x - 1.0, lambda: (x(),)),
}


class Net(nn.Module):
    def __init__(self, write: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.write = nn.Linear(6, 3), write

    def forward(self, *given: Any) -> Tensor:
        return self.a(self.write(*given))


@pytest.mark.parametrize("fisher", FISHER)
@pytest.mark.parametrize("name", WRITES)
def test_every_pass_is_given_what_the_user_s_was(name: str, fisher: str) -> None:
    write, given = WRITES[name]
    net = Net(write)
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, fisher=fisher, update_aux_every=1, lr=0, curvature_batch=None)
    passes = optimizer._passes
    for _ in range(3):
        out = net(*given())
        LIKELIHOOD.nll(torch.zeros(40, 3), out).backward()
        inputs = passes.inputs()
        for _ in range(2):  # and one batch serves several passes
            assert torch.equal(passes.run(inputs, 0, lambda: passes.outputs(inputs)), out)  # noqa: B023
        optimizer.step()
    assert passes.tap.writes.seen == (name != "nothing")


@pytest.mark.parametrize("name", WRITES)
def test_batches_of_a_loader_and_own_functions(name: str) -> None:
    write, given = WRITES[name]
    net, outputs = Net(write), Unseen()

    def draw(model: nn.Module, x: Any) -> Tensor:
        out = model(*x)
        outputs.append(out.detach())
        return out

    def nll(model: nn.Module, x: Any, y: Tensor) -> Tensor:
        out = model(*x)
        outputs.append(out.detach())
        return (out - y).square().mean()

    optimizer = FishLeg(net, draw, nll, aux_loader=[(given(),)])
    passes = optimizer._passes
    for _ in range(2):
        inputs = passes.inputs()
        for _ in range(2):
            passes.run(inputs, 0, lambda: passes.drawn_loss(inputs))  # noqa: B023
    want = net(*given())
    assert len(outputs) >= 8 and all(torch.allclose(out, want[: len(out)], atol=1e-5) for out in outputs)


@pytest.mark.parametrize("name", WRITES)
def test_the_user_s_own_tensors_are_written_to_once(name: str) -> None:
    write, given = WRITES[name]
    net, mine, want = Net(write), given(), given()
    optimizer = FishLeg(net, likelihood=LIKELIHOOD)
    LIKELIHOOD.nll(torch.zeros(40, 3), net(*mine)).backward()
    optimizer.step()
    write(*want)
    for a, b in zip(tree_leaves(mine), tree_leaves(want), strict=True):
        assert torch.equal(a, b)


class Batch:
    """A batch that is no mapping and no sequence."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.more, self.log = x, {"z": x + 1}, []


@dataclasses.dataclass
class Record:
    x: Tensor
    inner: Any = None


def rebind(d: Any) -> Tensor:
    d.x = d.x * 2
    d.calls = getattr(d, "calls", 0) + 1
    return d.x


def write_within(d: Any) -> Tensor:
    d.more["z"] += 1
    d.more["y"] = d.x
    d.log.append(len(d.x))
    return d.x + d.more["z"]


def write_inner(d: Any) -> Tensor:
    d.inner.x = d.inner.x.mul_(0.5) + d.x
    return d.inner.x


OBJECTS: dict[str, tuple[Callable[[Any], Tensor], Callable[[], Any]]] = {
    "an attribute": (rebind, lambda: SimpleNamespace(x=x())),
    "a dataclass": (rebind, lambda: Record(x())),
    "what attributes hold": (write_within, lambda: Batch(x())),
    "objects in objects": (write_inner, lambda: Record(x(), SimpleNamespace(x=x(1)))),
}


def picture(d: Any) -> Any:
    if isinstance(d, Tensor):
        return id(d), d.tolist()
    if isinstance(d, dict):
        return {key: picture(value) for key, value in d.items()}
    return picture(d.__dict__) if hasattr(d, "__dict__") else repr(d)


@pytest.mark.parametrize("loader", [False, True])
@pytest.mark.parametrize("name", OBJECTS)
def test_steps_leave_objects_as_the_user_s_pass_did(name: str, loader: bool) -> None:
    write, given = OBJECTS[name]
    net, mine, theirs = Net(write), given(), given()
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, aux_loader=[(theirs,)] if loader else None, update_aux_every=1)
    for _ in range(3):
        out = net(mine)
        LIKELIHOOD.nll(torch.zeros_like(out), out).backward()
        before = picture(mine), picture(theirs)
        optimizer.step()
        assert (picture(mine), picture(theirs)) == before
    assert optimizer.diagnostics()["aux_steps"] == 3
