"""Parameters that are tensor subclasses, whose memory is not what their shape says, are refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

from fishleg_fast import FishLeg
from support.classifier import LIKELIHOOD, make, train


class Named(nn.Parameter):
    """A parameter of a class of the user's own, which is as plain as any."""


def distributed(t: Tensor) -> Tensor:
    return distribute_tensor(t, init_device_mesh("cpu", (1,)), [Replicate()])


WRAPPERS: dict[str, Callable[[Tensor], Tensor]] = {
    "DTensor": distributed,
    "TwoTensor": lambda t: TwoTensor(t, t.clone()),
}


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrap(module: nn.Module, name: str, kind: str) -> nn.Parameter:
    new = nn.Parameter(WRAPPERS[kind](getattr(module, name).detach()))
    assert type(new) is {"DTensor": DTensor, "TwoTensor": TwoTensor}[kind]
    setattr(module, name, new)
    return new


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("when", ["made", "added", "replaced"])
def test_wrapped_parameters_are_refused(kind: str, name: str, when: str) -> None:
    net, _ = make()
    told = pytest.raises(
        TypeError, match=rf"parameter '2\.{name}' should be a plain .* is a {kind}.*make the optimizer of"
    )
    if when == "made":
        wrap(net[2], name, kind)
        with told:
            FishLeg(net, likelihood=LIKELIHOOD)
    elif when == "added":
        optimizer = FishLeg(net, likelihood=LIKELIHOOD, params=net[0].parameters())
        new = wrap(net[2], name, kind)
        with told:
            optimizer.add_param_group({"params": [new]})
        assert len(optimizer.param_groups) == 1
    else:
        optimizer = FishLeg(net, likelihood=LIKELIHOOD)
        train(net, optimizer, 2)
        old = getattr(net[2], name)
        new = wrap(net[2], name, kind)
        (group,) = optimizer.param_groups
        group["params"] = [new if p is old else p for p in group["params"]]
        with told:
            optimizer.step()
        assert [b.name for b in optimizer.blocks] == ["0", "2"]


def test_parameters_of_a_class_of_ones_own_train() -> None:
    net, _ = make()
    net[2].weight = Named(net[2].weight.detach())
    optimizer = FishLeg(net, likelihood=LIKELIHOOD)
    before = net[2].weight.detach().clone()
    train(net, optimizer, 2)
    assert not torch.equal(net[2].weight, before)
