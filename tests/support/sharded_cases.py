"""What ranks do with a model that was given to ``fully_shard``, and one process with the joined batches."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from fishleg_fast import FishLeg
from support.distributed_cases import Predictable, batch, loss_of, make, rank_and_size, sharded, watched

STATE = ("step", "momentum", "aux_step", "exp_avg", "exp_avg_sq", "moments", "moments_weight", "unit")


def whole(p: Tensor) -> Tensor:
    """All of a parameter, on every rank."""
    full = getattr(p, "full_tensor", None)
    return (p if full is None else full()).detach().clone()


def tensors(net: nn.Module) -> list[Tensor]:
    return [whole(p) for p in net.parameters()]


def state_bytes(optimizer: FishLeg) -> int:
    """Of λ and all that is kept beside it, the stand-ins of parameters too, on this rank."""
    found = 0
    for b in optimizer.blocks:
        held = [b.momentum, *b.moments.values(), *b.exp_avg.values(), *b.exp_avg_sq.values()]
        held += [*b.structure.fishleg_aux.values(), *b.structure.cache.values()]
        found += sum(t.nbytes for t in held) + sum(part.param.nbytes for part in b.parts if b.sharded)
    return found


def told(optimizer: FishLeg) -> dict[str, Any]:
    names = ("steps", "aux_steps", "anchors", "skipped_steps", "skipped_aux_steps", "shortened_steps")
    report = optimizer.diagnostics()
    found = {name: report[name] for name in names}
    for name in ("normalize", "factors"):
        found[name] = {block.removeprefix("module."): value for block, value in report[name].items()}
    return found


def train(model: str, dtype: torch.dtype = torch.float64, steps: int = 7, copies: int = 1, **given: Any) -> dict:
    net, outer, optimizer = make(model, dtype, copies=copies, **given)
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(outer, batch(step, dtype), optimizer.likelihood).backward()
        optimizer.step()
        norms.append(optimizer.diagnostics()["grad_norm"])
    return {
        "tensors": [*tensors(net), *tensors(optimizer.likelihood)], "told": told(optimizer), "norms": norms,
        "wrong": [b.name.removeprefix("module.") for b in optimizer._layouts if b.layer_agrees is False],
        "blocks": [b.name.removeprefix("module.") for b in optimizer.blocks], "bytes": state_bytes(optimizer),
    }  # fmt: skip


def many(cases: dict[str, dict]) -> dict[str, dict]:
    """Several trainings in one group."""
    return {name: train(**given) for name, given in cases.items()}


def saved(folder: str, steps: int, at: int, model: str = "mlp") -> dict:
    """A training that is saved after step ``at`` by all ranks together."""
    net, outer, optimizer = make(model, torch.float64, copies=1)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(outer, batch(step, torch.float64)).backward()
        optimizer.step()
        if step == at:
            held = {"optimizer": get_optimizer_state_dict(net, optimizer), "model": net.state_dict()}
            checkpoint.save(held, checkpoint_id=folder, no_dist=not dist.is_initialized())
    return {"tensors": tensors(net), "seeds": [optimizer._passes.seed() for _ in range(3)]}


def resumed(folder: str, steps: int, model: str = "mlp", again: str = "") -> dict:
    """A training that goes on from there, with any number of ranks, and is saved once more half-way."""
    net, outer, optimizer = make(model, torch.float64, copies=1)
    held = {"optimizer": get_optimizer_state_dict(net, optimizer), "model": net.state_dict()}
    alone = not dist.is_initialized()
    checkpoint.load(held, checkpoint_id=folder, no_dist=alone)
    net.load_state_dict(held["model"])
    set_optimizer_state_dict(net, optimizer, held["optimizer"])
    first = optimizer.diagnostics()["steps"]
    for step in range(first, steps):
        optimizer.zero_grad()
        loss_of(outer, batch(step, torch.float64)).backward()
        optimizer.step()
        if again and step == (first + steps) // 2:
            held = {"optimizer": get_optimizer_state_dict(net, optimizer), "model": net.state_dict()}
            checkpoint.save(held, checkpoint_id=again, no_dist=alone)
    return {"tensors": tensors(net), "seeds": [optimizer._passes.seed() for _ in range(3)], "first": first}


def refusals(names: list[str]) -> dict[str, str]:
    """What is said of each."""
    found = {}
    for name in names:
        try:
            _REFUSED[name]()
            found[name] = "nothing"
        except (ValueError, TypeError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _made(**given: Any) -> FishLeg:
    return make("mlp", torch.float64, copies=1, **given)[2]


def _of_other_meshes() -> None:
    net = make("mlp", torch.float64, wrapped=False)[0]
    size = dist.get_world_size()
    sharded(net[0:1], 1)
    mesh = dist.init_device_mesh("cpu", (size, 1), mesh_dim_names=("copy", "shard"))
    from torch.distributed.fsdp import fully_shard

    FishLeg(fully_shard(net, mesh=mesh), likelihood=Predictable())


def _another_rate() -> None:
    _made(lr=0.01 * (1 + rank_and_size()[0]))


def _replaced() -> None:
    _, outer, optimizer = make("mlp", torch.float64, copies=1)
    optimizer.param_groups[0]["params"].pop()
    loss_of(outer, batch(0, torch.float64)).backward()
    optimizer.step()


def _hidden() -> None:
    net, _, optimizer = make("hidden", torch.float64, copies=1)
    loss_of(net, batch(0, torch.float64)).backward()
    optimizer.step()


_REFUSED = {
    "training": lambda: _made(anchor_from="training"),
    "capturable": lambda: _made(capturable=True),
    "hessian": lambda: _made(fisher="hessian"),
    "other meshes": _of_other_meshes,
    "another rate": _another_rate,
    "replaced": _replaced,
    "hidden": _hidden,
}


def faults(kinds: list[str]) -> dict[str, dict]:
    """Trainings in which the last rank has trouble at step 4, which learns and anchors."""
    return {kind: _fault(kind) for kind in kinds}


def _fault(kind: str) -> dict:
    rank, count = rank_and_size()
    last = rank == count - 1
    net, outer, optimizer = make("mlp", torch.float64, copies=1)
    step, passing = 0, watched(optimizer)

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output * float("nan") if last and step == 4 and passing() and kind == "nan in a pass" else output

    net[2].register_forward_hook(hook)
    for step in range(8):
        optimizer.zero_grad()
        x = batch(step, torch.float64)
        if last and step == 4 and kind == "empty":
            x = x[:0]
        if last and step == 4 and kind == "nan":
            x = x * float("nan")
        (loss_of(outer, x) if len(x) else outer(x).sum()).backward()
        optimizer.step()
    return {"tensors": tensors(net), "told": told(optimizer)}


def killed() -> None:
    """The last rank dies in the middle of a step."""
    rank, count = rank_and_size()
    _, outer, optimizer = make("mlp", torch.float64, copies=1)
    if rank == count - 1:
        optimizer._passes.run = lambda *args, **given: os.kill(os.getpid(), signal.SIGKILL)
    loss_of(outer, batch(0, torch.float64)).backward()
    optimizer.step()


def folder_of(path: Path) -> str:
    """Made on first use."""
    path.mkdir(exist_ok=True)
    return str(path)


class Handed:
    """Counts the bytes that this process hands to collectives of Python's, but for a few numbers."""

    NAMES: ClassVar = {
        "all_reduce": "all-reduce",
        "reduce": "reduce",
        "broadcast": "broadcast",
        "all_to_all_single": "all-to-all",
    }

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}
        self._real = {name: getattr(dist, name) for name in self.NAMES}

    def _noted(self, name: str, *args: Any, **given: Any) -> Any:
        tensor = args[1] if name == "all_to_all_single" else args[0]
        if tensor.numel() > 20:
            self.bytes[self.NAMES[name]] = self.bytes.get(self.NAMES[name], 0) + tensor.nbytes
        return self._real[name](*args, **given)

    def __enter__(self) -> Handed:
        for name in self.NAMES:
            setattr(dist, name, partial(self._noted, name))
        return self

    def __exit__(self, *error: object) -> None:
        for name, real in self._real.items():
            setattr(dist, name, real)


def handed(kinds: dict[str, dict]) -> dict[str, list[dict[str, int]]]:
    """Of each way to share out a GPT: bytes handed to collectives in a step of which no update of λ is, in one that is
    measured besides, in one with an update of λ, and one that anchors too; step 0 looks at layers besides.
    """
    return {kind: [_handed(given, *case) for case in ((1, False), (1, True), (2, False), (4, False))]
            for kind, given in kinds.items()}  # fmt: skip


def _handed(given: dict, last: int, limited: bool) -> dict[str, int]:
    _, outer, optimizer = make("wide gpt", torch.float32, step_limit=1.0 if limited else None, **given)
    for step in range(last + 1):
        optimizer.zero_grad()
        loss_of(outer, batch(step, torch.float32), optimizer.likelihood).backward()
        with Handed() as counted:
            optimizer.step()
    assert not limited or optimizer.diagnostics()["step_scale"] is not None
    return counted.bytes


def soak(folder: str, steps: int, go_on_from: int = 0, save_every: int = 0, **given: Any) -> dict:
    """A long training in which gradients are missing, or not finite on one rank, and lr changes, at random; from a
    checkpoint that such a one wrote, if it is to go on.
    """
    net, outer, optimizer = make("mlp", torch.float64, **given)
    rank, count = rank_and_size()
    held = lambda: {"optimizer": get_optimizer_state_dict(net, optimizer), "model": net.state_dict()}
    if go_on_from:
        read = held()
        checkpoint.load(read, checkpoint_id=f"{folder}/{go_on_from}")
        net.load_state_dict(read["model"])
        set_optimizer_state_dict(net, optimizer, read["optimizer"])
    for step in range(go_on_from, steps):
        chance = torch.rand(3 + len(list(net.parameters())), generator=torch.Generator().manual_seed(step)).tolist()
        if chance[0] < 0.1:
            optimizer.param_groups[0]["lr"] = 0.001 + 0.02 * chance[1]
        optimizer.zero_grad()
        x = batch(step, torch.float64)
        if chance[2] < 0.05 and rank == step % count:
            x = x * float("nan")
        loss_of(outer, x).backward()
        for p, other in zip(net.parameters(), chance[3:], strict=True):
            if other < 0.05:
                p.grad = None
        optimizer.step()
        if save_every and (step + 1) % save_every == 0:
            checkpoint.save(held(), checkpoint_id=f"{folder}/{step + 1}")
    return {"tensors": tensors(net), "told": told(optimizer)}
