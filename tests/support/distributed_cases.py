"""What ranks do in the tests of several processes, and one process with the joined batches."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fishleg_fast import FishLeg, GaussianLikelihood

BATCH = 8  # of all ranks together


class Predictable(GaussianLikelihood):
    """Labels that do not depend on who draws them, nor on what else is in the batch."""

    def draw(self, outputs: Tensor) -> Tensor:
        return outputs.detach() + torch.cos(1000 * outputs.detach()) * 2**0.5


class Attend(nn.Module):
    """A small transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.unflatten(1, (2, 6)))
        h = h + self.attention(self.norm(h), self.norm(h), self.norm(h), need_weights=False)[0]
        return self.head(h)


class Unused(nn.Module):
    """One layer of two, of which a batch uses that of its first number; each rank may use another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 5) for _ in range(2)])
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers[int(x[0, 0] > 0)](x).tanh())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3))


def convolutions() -> nn.Module:
    first = nn.Conv2d(1, 4, 3, padding=1)
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)), first, nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)
    )


class Mix(nn.Module):
    """A layer of a transformer that is made of plain ones: attention over positions, and a small net."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.RMSNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](h)).unflatten(2, (2, -1)).transpose(1, 2).chunk(3, -1)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.norms[1](h))))


class Gpt(nn.Module):
    """Words, positions, layers."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(4, width), nn.Embedding(6, width)
        self.layers = nn.ModuleList([Mix(width) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        words = (x[:, :6] > 0) * 2 + (x[:, 6:] > 0.5)
        h = self.words(words) + self.positions(torch.arange(6).expand(len(x), 6))
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h)).mean(1)


class Residual(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2)])
        self.norms = nn.ModuleList([nn.GroupNorm(2, width) for _ in range(2)])

    def forward(self, h: Tensor) -> Tensor:
        y = self.norms[0](self.convolutions[0](h)).relu()
        return (h + self.norms[1](self.convolutions[1](y))).relu()


def resnet() -> nn.Module:
    """Without BatchNorm, whose statistics are of a rank's own batch."""
    first = nn.Conv2d(1, 4, 3, padding=1)
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)), first, Residual(4), Residual(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip


class Scaled(nn.Linear):
    """Not what it shows."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.05, self.bias)


def scaled() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 7), nn.Tanh(), Scaled(7, 7), nn.Tanh(), nn.Linear(7, 3))


class Checkpointed(nn.Module):
    """Layers that run once more during the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 7), nn.Linear(7, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = checkpoint(layer, x, use_reentrant=False).tanh()
        return self.last(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.RNN(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x.unflatten(1, (3, 4)))[0][:, -1])


class Opaque(torch.autograd.Function):
    """tanh, without a forward derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(y := x.tanh())
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * (1 - ctx.saved_tensors[0].square())


class WithOpaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Opaque.apply(self.first(x)))


class Hidden(nn.Module):
    """A layer that hides from one of two derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.first(x)
        return self.last((h + self.first(x)).tanh())


class Padded(nn.Module):
    """Words of which one is padding, whose vectors are the last layer's weights too."""

    def __init__(self, tied: bool = True, sparse: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(3, 4, padding_idx=0, sparse=sparse)
        self.hidden, self.head = nn.Linear(4, 4), nn.Linear(4, 3, bias=False)
        if tied:
            self.head.weight = self.words.weight
        with torch.no_grad():
            self.words.weight[0] = 0.3

    def forward(self, x: Tensor) -> Tensor:
        words = (x > -0.5).long() + (x > 0.5)
        return self.head(self.hidden(self.words(words).mean(1)).tanh())


class OwnParameter(nn.Module):
    """A layer beside a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 12))
        self.first, self.last = nn.Linear(12, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x * self.scale).tanh())


def frozen() -> nn.Module:
    net = mlp()
    for p in net[0].parameters():
        p.requires_grad_(False)
    return net


def with_hook() -> nn.Module:
    """Its inputs are scaled before its forward."""
    net = mlp()
    net.register_forward_pre_hook(lambda module, args: (args[0] / 5,))
    return net


def with_old_weight_norm() -> nn.Module:
    """A weight is made before each forward, of parameters."""
    net = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(net[2])
    return net


MODELS = {
    "padded": Padded,
    "sparse": partial(Padded, tied=False, sparse=True),
    "own parameter": OwnParameter,
    "frozen": frozen,
    "hook": with_hook,
    "old weight norm": with_old_weight_norm,
    "mlp": mlp,
    "attention": Attend,
    "convolutions": convolutions,
    "unused": Unused,
    "gpt": Gpt,
    "wide gpt": partial(Gpt, 32),
    "resnet": resnet,
    "checkpointed": Checkpointed,
    "scaled": scaled,
    "hidden": Hidden,
    "opaque": WithOpaque,
    "recurrent": Recurrent,
}


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
