"""Several processes, used as users do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fishleg_fast import FishLeg, GaussianLikelihood
from support.distributed_cases import Predictable, batch, mlp

SETTINGS: dict[str, Any] = {
    "lr": 0.02, "update_aux_every": 2, "anchor_every": 4, "curvature_batch": None, "thin_gradients": False,
}  # fmt: skip


class Holder(nn.Module):
    """A user's module around the wrapped one."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def net() -> nn.Module:
    torch.manual_seed(0)
    return mlp().double()


def trained(
    outer: nn.Module,
    optimizer: FishLeg,
    likelihood: Any = None,
    before: Callable[[int], None] = lambda k: None,
    backward_in: Callable[[], Any] = nullcontext,
) -> bool:
    """Whether ranks' parameters are equal after ten steps."""
    for k in range(10):
        optimizer.zero_grad()
        before(k)
        with backward_in():
            outputs = outer(batch(k, torch.float64))
            (likelihood or Predictable()).nll(outputs.detach().sin() + 1, outputs).backward()
        optimizer.step()
    flat = torch.cat([p.detach().flatten() for group in optimizer.param_groups for p in group["params"]])
    others = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(others, flat)
    return all(torch.equal(flat, other) for other in others)


def the_inner_module() -> bool:
    inner = net()
    outer = DistributedDataParallel(inner)
    return trained(outer, FishLeg(inner, likelihood=Predictable(), **SETTINGS))


def within_a_module() -> bool:
    outer = Holder(DistributedDataParallel(net()))
    return trained(outer, FishLeg(outer, likelihood=Predictable(), **SETTINGS))


def a_learned_likelihood() -> bool:
    outer, likelihood = DistributedDataParallel(net()), GaussianLikelihood(learn=True).double()
    return trained(outer, FishLeg(outer, likelihood=likelihood, **SETTINGS), likelihood)


def unfrozen_later() -> bool:
    inner = net()
    inner[2].requires_grad_(False)  # type: ignore[index]
    outer = DistributedDataParallel(inner)
    optimizer = FishLeg(outer, likelihood=Predictable(), **SETTINGS)

    def before(k: int) -> None:
        if k == 5:
            inner[2].requires_grad_(True)  # type: ignore[index]
            optimizer.add_param_group({"params": list(inner[2].parameters())})  # type: ignore[index]

    return trained(outer, optimizer, before=before)


def step_after_no_sync() -> bool:
    outer = DistributedDataParallel(net())
    optimizer = FishLeg(outer, likelihood=Predictable(), **SETTINGS)
    return trained(outer, optimizer, backward_in=outer.no_sync)


def not_averaged() -> bool:
    inner = net()
    return trained(inner, FishLeg(inner, likelihood=Predictable(), process_group=dist.group.WORLD, **SETTINGS))


def other_backends() -> bool:
    outer, backend = DistributedDataParallel(net()), ("reference", "cpp")[dist.get_rank()]
    return trained(outer, FishLeg(outer, likelihood=Predictable(), backend=backend, **SETTINGS))


def other_thread_counts() -> bool:
    torch.set_num_threads(1 + dist.get_rank())  # sums of so many numbers are then rounded otherwise
    torch.manual_seed(0)
    outer = DistributedDataParallel(nn.Linear(12, 3000))
    FishLeg(outer, likelihood=Predictable(), structure="diagonal", init="sgd", anchor_every=0)
    return True


def not_a_member() -> bool:
    group = dist.new_group([0])
    FishLeg(net(), likelihood=Predictable(), process_group=group, **SETTINGS)
    return dist.get_rank() == 0


EQUAL = [within_a_module, a_learned_likelihood, unfrozen_later, other_thread_counts]
REFUSED = {
    the_inner_module: "process_group",
    not_averaged: "averaged",
    step_after_no_sync: "averaged|no_sync",
    other_backends: "backend",
}


def found(name: str) -> Any:
    try:
        return globals()[name]()
    except (RuntimeError, ValueError) as error:
        return str(error)
    finally:
        torch.set_num_threads(1)


def everything(names: list[str]) -> dict[str, Any]:
    return {name: found(name) for name in names}
