"""Several processes, used as users do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fishleg_fast import FishLeg, GaussianLikelihood
from fishleg_fast.fisher import layer_pass
from support.distributed_cases import Predictable, batch
from support.ranked_models import convolutions, mlp

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
    whole = lambda p: getattr(p, "full_tensor", lambda: p)().detach().flatten()
    flat = torch.cat([whole(p) for group in optimizer.param_groups for p in group["params"]])
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


def differ(**of_each: Any) -> bool:
    """Each setting is the first of a pair on rank 0, the second on rank 1."""
    mine = {name: pair[dist.get_rank()] for name, pair in of_each.items()}
    return bool(FishLeg(DistributedDataParallel(net()), likelihood=Predictable(), **{**SETTINGS, **mine}))


def other_patterns() -> bool:
    return differ(normalize=({"*": "rms"}, {"*": "spectral"}))


def none_and_rms() -> bool:
    return differ(normalize=(None, "rms"), damping_scale=("absolute", "absolute"), damping=(0.1, 0.1))


def precision_of_one() -> bool:
    return differ(precision=(None, "medium"))


def state_shared_by_one() -> bool:
    return differ(shard_state=(True, False))


def precision_of_a_process() -> bool:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(("highest", "medium")[dist.get_rank()])
    try:
        return bool(FishLeg(DistributedDataParallel(mlp()), likelihood=Predictable(), **SETTINGS))
    finally:
        torch.set_float32_matmul_precision(before)


def not_averaged_once() -> bool:
    """In a step that does not look whether they are."""
    inner = net()
    outer = DistributedDataParallel(inner)
    optimizer, local = FishLeg(outer, likelihood=Predictable(), **SETTINGS), []

    def backward_in() -> Any:
        local.append(len(local) == 3)
        return outer.no_sync() if local[-1] else nullcontext()

    return trained(outer, optimizer, backward_in=backward_in)


def on_meta() -> bool:
    with torch.device("meta"):
        inner = mlp()
    fully_shard(inner)
    return bool(FishLeg(inner, likelihood=Predictable(), **SETTINGS))


def let_go_of(shard: bool) -> bool:
    """Once state is let go of, ranks start anew, as an optimizer made then does."""
    ends = []
    for anew in (False, True):
        inner = net()
        outer = fully_shard(inner) if shard else DistributedDataParallel(inner)
        make = lambda outer=outer: FishLeg(outer, likelihood=Predictable(), shard_state=not shard, **SETTINGS)
        optimizer = make()
        trained(outer, optimizer)
        if anew:
            optimizer = make()
        else:
            optimizer.state = defaultdict(dict)
            seed = optimizer._passes.generator
            seed.set_state((0, 0))
            optimizer._diagnostics.load(dict.fromkeys(optimizer._diagnostics.counts(), 0))
        trained(outer, optimizer)
        held = len([t for state in optimizer.state_dict()["state"].values() for t in state])
        ends.append((held, [p.detach().clone() for p in inner.parameters()]))
    (few, some), (all_, others) = ends
    local = lambda p: getattr(p, "to_local", lambda: p)()
    return few == all_ and all(torch.equal(local(a), local(b)) for a, b in zip(some, others, strict=True))


def state_let_go_of_by_fully_shard() -> bool:
    return let_go_of(True)


def state_let_go_of_when_shared() -> bool:
    return let_go_of(False)


class Masked(nn.Module):
    """Of two inputs, of which a rank may have no use for the second."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.net(x if mask.all() else x * mask[:, None])


def batches_of_other_kinds() -> bool:
    """By default, with inputs of which ranks learn different things, and uneven ones."""
    torch.manual_seed(0)
    outer = Masked().double()
    for unit in (*(m for m in outer.net if isinstance(m, nn.Linear)), outer):  # type: ignore[union-attr]
        fully_shard(unit)
    optimizer = FishLeg(outer, likelihood=Predictable(), lr=0.02, update_aux_every=2, anchor_every=4)
    for k in range(10):
        x = batch(k, torch.float64, size=(8, 34)[k % 2])[dist.get_rank() * (k == 4) :]
        mask = torch.ones(len(x), dtype=torch.float64)
        mask[0] = 1.0 - dist.get_rank() * (k % 3 == 0)
        optimizer.zero_grad()
        outputs = outer(x, mask)
        Predictable().nll(outputs.detach().sin() + 1, outputs).backward()
        optimizer.step()
    return True


def convolutions_of_uneven_batches() -> bool:
    """Of which one rank's are so many that it takes them in parts: moments are those of shared state all the same."""
    limit, layer_pass.ENTRIES = layer_pass.ENTRIES, 600
    found = []
    try:
        for shard in (True, False):
            torch.manual_seed(0)
            inner = convolutions().double()
            if shard:
                for unit in (inner[1], inner[5], inner):  # type: ignore[index]
                    fully_shard(unit)
            outer = inner if shard else DistributedDataParallel(inner)
            optimizer = FishLeg(outer, likelihood=Predictable(), shard_state=not shard, **SETTINGS)
            for k in range(5):
                optimizer.zero_grad()
                x = batch(k, torch.float64, size=18)[: 9 - 8 * dist.get_rank()]
                outputs = outer(x)
                Predictable().nll(outputs.detach().sin() + 1, outputs).backward()
                optimizer.step()
            found.append({b.name.removeprefix("module."): dict(b.moments) for b in optimizer.blocks})
    finally:
        layer_pass.ENTRIES = limit
    first, second = found
    close = lambda a, b: bool((a - b).norm() <= 1e-10 * b.norm())
    return first.keys() == second.keys() and all(
        close(first[name][kind], t) for name, moments in second.items() for kind, t in moments.items()
    )


def a_bias_frozen_later() -> bool:
    """Trains as replicas do."""
    ends = []
    for shared in (False, True):
        inner = net()
        outer = DistributedDataParallel(inner, find_unused_parameters=True)
        settings = {**SETTINGS, "anchor_every": 0, "init": "sgd", "shard_state": shared}
        optimizer = FishLeg(outer, likelihood=Predictable(), **settings)

        def before(k: int, inner: nn.Module = inner) -> None:
            inner[2].bias.requires_grad_(k < 3)  # type: ignore[index]

        trained(outer, optimizer, before=before)
        ends.append(torch.cat([p.detach().flatten() for p in inner.parameters()]))
    return bool((ends[0] - ends[1]).norm() <= 1e-10 * ends[0].norm())


def spoilt(shard: bool) -> bool:
    """The λ of a block that one rank has is not finite: every rank raises."""
    inner = net()
    outer = fully_shard(inner) if shard else DistributedDataParallel(inner)
    optimizer = FishLeg(outer, likelihood=Predictable(), shard_state=not shard, **SETTINGS)

    def before(k: int) -> None:
        if k == 3 and dist.get_rank() == 0:
            next(iter(optimizer.blocks[0].structure.fishleg_aux.values())).fill_(float("nan"))

    return trained(outer, optimizer, before=before)


def spoilt_with_fully_shard() -> bool:
    return spoilt(True)


def spoilt_when_shared() -> bool:
    return spoilt(False)


def not_a_member() -> bool:
    group = dist.new_group([0])
    FishLeg(net(), likelihood=Predictable(), process_group=group, **SETTINGS)
    return dist.get_rank() == 0


EQUAL = [
    within_a_module, a_learned_likelihood, unfrozen_later, other_thread_counts, batches_of_other_kinds,
    convolutions_of_uneven_batches, a_bias_frozen_later, state_let_go_of_by_fully_shard, state_let_go_of_when_shared,
]  # fmt: skip
REFUSED = {
    the_inner_module: "process_group",
    not_averaged: "averaged",
    step_after_no_sync: "averaged|no_sync",
    other_backends: "backend",
    other_patterns: r"normalize= is \(\('\*', 'rms'\),\) on rank 0 and \(\('\*', 'spectral'\),\) on rank 1",
    none_and_rms: "normalize= is None on rank 0 and 'rms' on rank 1",
    precision_of_one: "precision= is None on rank 0 and 'medium' on rank 1",
    precision_of_a_process: r"get_float32_matmul_precision\(\) is 'highest' on rank 0 and 'medium' on rank 1",
    state_shared_by_one: "shard_state= is True on rank 0 and False on rank 1",
    not_averaged_once: "parameters should be the same on all ranks.*no_sync",
    spoilt_with_fully_shard: "is not finite; load a checkpoint|1 of 2 ranks failed in a pass",
    spoilt_when_shared: "is not finite; load a checkpoint|1 of 2 ranks failed in a pass",
    on_meta: "parameter '0.weight' should have memory but is on the meta device",
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
