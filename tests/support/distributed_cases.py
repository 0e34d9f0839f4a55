"""What ranks do in the tests of several processes, and one process with the joined batches."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fishleg_fast import FishLeg, GaussianLikelihood
from support.ranked_models import MODELS, Mix, Residual

BATCH = 8  # of all ranks together


class Predictable(GaussianLikelihood):
    """Labels that do not depend on who draws them, nor on what else is in the batch."""

    def draw(self, outputs: Tensor) -> Tensor:
        return outputs.detach() + torch.cos(1000 * outputs.detach()) * 2**0.5


def rank_and_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def batch(step: int, dtype: torch.dtype, size: int = BATCH) -> Tensor:
    """This rank's share of a step's inputs."""
    rank, count = rank_and_size()
    x = torch.randn(size, 12, generator=torch.Generator().manual_seed(1000 + step), dtype=torch.float64)
    return x.to(dtype).chunk(count)[rank]


def sharded(net: nn.Module, copies: int = 1, units: str = "all") -> nn.Module:
    """The net, its layers and it given to ``fully_shard``; ``copies``: of it (HSDP). ``units``: "root": it alone;
    "one": nothing but one layer.
    """
    size = dist.get_world_size()
    shape, names = ((size,), ("shard",)) if copies == 1 else ((copies, size // copies), ("copy", "shard"))
    mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=names)
    if units == "one":
        fully_shard([*net.children()][-1], mesh=mesh)
        return net
    for child in net.modules() if units == "all" else ():
        small = any(child is c for c in net.children()) and [*child.parameters(recurse=False)]
        if isinstance(child, (Mix, Residual)) or small:
            fully_shard(child, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def make(
    model: str,
    dtype: torch.dtype,
    wrapped: bool = True,
    ddp: dict | None = None,
    copies: int = 0,
    noise: bool = False,
    units: str = "all",
    **given: Any,
):
    """``copies``, ``units``: with fully_shard, of so many copies of the model. ``noise``: learn the likelihood's."""
    torch.manual_seed(0)
    net = MODELS[model]().to(dtype)
    several = dist.is_initialized()
    wrapped = wrapped and not copies
    if copies and several:
        net = sharded(net, copies, units)
    outer = DistributedDataParallel(net, **(ddp or {})) if wrapped and several else net
    settings = {"lr": 0.02, "update_aux_every": 2, "anchor_every": 4, "curvature_batch": None, **given}
    group = dist.group.WORLD if several and not wrapped and not copies else None
    optimizer = FishLeg(
        outer,
        likelihood=Predictable(learn=noise).to(dtype),
        thin_gradients=False,
        backend="reference",
        process_group=group,
        **settings,
    )
    return net, outer, optimizer


def loss_of(net: nn.Module, x: Tensor, likelihood: GaussianLikelihood | None = None) -> Tensor:
    outputs = net(x)
    return (likelihood or Predictable()).nll(outputs.detach().sin() + 1, outputs)


def tensors(net: nn.Module, optimizer: FishLeg) -> list[Tensor]:
    own = [t for b in optimizer.blocks for t in (*b.structure.fishleg_aux.values(), b.momentum, *b.moments.values())]
    return [t.detach().clone() for t in (*net.parameters(), *own)]


def train(model: str, dtype: torch.dtype = torch.float64, steps: int = 7, wrapped: bool = True, **given: Any) -> dict:
    """The tensors that it ends with, and diagnostics."""
    net, outer, optimizer = make(model, dtype, wrapped, **given)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(outer, batch(step, dtype), optimizer.likelihood).backward()
        if not wrapped and dist.is_initialized():
            for p in net.parameters():
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
        optimizer.step()
    told = optimizer.diagnostics()
    return {
        "tensors": tensors(net, optimizer),
        "told": {k: told[k] for k in ("steps", "aux_steps", "anchors", "skipped_steps", "shortened_steps")},
    }


def many(cases: dict[str, dict]) -> dict[str, dict]:
    """Several trainings in one group."""
    return {name: train(**given) for name, given in cases.items()}


def watched(optimizer: FishLeg) -> Callable[[], bool]:
    """Tells whether a pass of the optimizer's is under way."""
    run, under_way = optimizer._passes.run, []

    def noted(*args: Any, **given: Any) -> Any:
        under_way.append(True)
        try:
            return run(*args, **given)
        finally:
            under_way.pop()

    optimizer._passes.run = noted
    return lambda: bool(under_way)


def faults(kinds: list[str]) -> dict[str, dict]:
    """Trainings in which one rank, the last, has trouble at step 4, which learns and anchors: what was raised on each
    rank, at which step, and what they end with.
    """
    return {kind: fault(kind) for kind in kinds}


def fault(kind: str) -> dict:
    rank, count = rank_and_size()
    last = rank == count - 1
    raised: list[tuple[int, str, str]] = []
    try:
        if kind == "another rate":
            return make("mlp", torch.float64, lr=0.01 * (1 + rank)) and {}
        if kind == "another model":
            return make("mlp" if last else "attention", torch.float64, wrapped=False) and {}
        if kind == "other parameters":
            torch.random.manual_seed, keep = (lambda seed: keep(seed + rank)), torch.random.manual_seed
            torch.manual_seed = torch.random.manual_seed
            try:
                return make("mlp", torch.float64, wrapped=False) and {}
            finally:
                torch.random.manual_seed = torch.manual_seed = keep
    except ValueError as error:
        return {"raised": [(-1, type(error).__name__, str(error))]}
    net, outer, optimizer = make("mlp", torch.float64)
    step, passing = 0, watched(optimizer)

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if last and step == 4 and passing() and kind == "a pass raises":
            raise RuntimeError("out of luck")
        return output * float("nan") if last and step == 4 and passing() and kind == "nan in a pass" else output

    net[0].register_forward_hook(hook)
    for step in range(8):
        optimizer.zero_grad()
        x = batch(step, torch.float64)
        if last and step == 4 and kind == "empty":
            x = x[:0]
        if last and step == 4 and kind == "nan":
            x = x * float("nan")
        try:
            with outer.no_sync() if kind == "no_sync" else outer.join() if kind == "join" else nullcontext():
                (loss_of(outer, x) if len(x) else outer(x).sum()).backward()
                optimizer.step()
        except RuntimeError as error:
            raised.append((step, type(error).__name__, str(error)))
            break
    told = optimizer.diagnostics()
    counts = {k: told[k] for k in ("steps", "aux_steps", "anchors", "skipped_steps", "skipped_aux_steps")}
    return {"raised": raised, "tensors": tensors(net, optimizer), "counts": counts}


def killed() -> None:
    """The last rank dies in the middle of a step."""
    rank, count = rank_and_size()
    _, outer, optimizer = make("mlp", torch.float64)
    if rank == count - 1:
        optimizer._passes.run = lambda *args, **given: os.kill(os.getpid(), signal.SIGKILL)
    loss_of(outer, batch(0, torch.float64)).backward()
    optimizer.step()


def resumed(folder: str, steps: int, saved: bool) -> dict:
    """A training that is saved by the first rank, or one that goes on from there."""
    net, outer, optimizer = make("mlp", torch.float64)
    first = 0
    if not saved:
        weights, state = torch.load(f"{folder}/checkpoint", weights_only=True)
        net.load_state_dict(weights)
        optimizer.load_state_dict(state)
        first = optimizer.diagnostics()["steps"]
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(outer, batch(step, torch.float64)).backward()
        optimizer.step()
        if saved and step == 4 and rank_and_size()[0] == 0:
            torch.save((net.state_dict(), optimizer.state_dict()), f"{folder}/checkpoint")
    return {"tensors": tensors(net, optimizer), "seeds": [optimizer._passes.seed() for _ in range(3)]}
