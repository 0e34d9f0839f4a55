"""What the user owns beside parameters is after a step what the user's own pass has left, bit for bit."""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fishleg_fast import FishLeg, GaussianLikelihood
from fishleg_fast.fisher import products
from fishleg_fast.passes.attributes import OBJECTS, KeptApart
from support.meters import AverageMeter, Link, Worker

COUNT = 0  # a global that hooks and forwards count in
LOG: list[float] = []


class Statistics:
    """A class of the user's own, with what a forward remembers."""

    def __init__(self) -> None:
        self.calls, self.sizes, self.mean = 0, [], torch.zeros(6)

    def see(self, x: Tensor) -> None:
        self.calls += 1
        self.sizes.append(len(x))
        self.mean.lerp_(x.detach().mean(0), 0.5)

    def hook(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.see(output)

    __call__ = hook


class Net(nn.Module):
    def __init__(self, keep: Callable[[Any, Tensor], Any], **attributes: Any) -> None:
        super().__init__()
        self.a, self.b, self.keep = nn.Linear(6, 6), nn.Linear(6, 3), keep
        self.__dict__.update(attributes)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        factor = self.keep(self, h)
        return self.b(h if factor is None else h * factor)


class Recurrent(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.out, self.h, self.calls = cell, nn.Linear(6, 3), None, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y, h = self.cell(x[:, None].expand(-1, 2, -1), self.h)
        self.h = h.detach() if isinstance(h, Tensor) else tuple(t.detach() for t in h)
        return self.out(y[:, -1])


def counting(net: Any, h: Tensor) -> float:
    global COUNT
    COUNT += 1
    net.calls += 1
    LOG.append(float(h.detach().sum()))
    return 1 + 1 / COUNT


def containers(net: Any, h: Tensor) -> Tensor:
    net.seen["sizes"].append(len(h))
    net.seen["means"][len(net.seen["sizes"])] = h.detach().mean(0)
    net.queue.append(h.detach().sum())
    net.names.add(f"call {len(net.seen['sizes'])}")
    net.bank["rows"][: len(h)] = h.detach()
    net.ordered.move_to_end(next(iter(net.ordered)))
    net.pair = (net.pair[0] + 1, net.pair[1].add_(1))
    net.tail += [float(h.detach().max())] * 3
    return 1 + net.bank["rows"].mean() + len(net.queue) + len(net.tail)


def in_place(net: Any, h: Tensor) -> Tensor:
    net.cache[: len(h)].lerp_(h.detach(), 0.5)
    net.view += 1
    net.array *= 0.5
    net.array[0] += 1
    return 1 + net.cache.mean(0) + float(net.array.sum())


def dice(net: Any, h: Tensor) -> Any:
    names = ("torch", "python", "numpy", "old numpy", "coin")
    rolls = [net.dice[k](6) if k == "coin" else _roll(net.dice[k]) for k in names if k in net.dice]
    return 1 + sum(rolls) + random.random() + np.random.randn() + float(torch.rand(()))


def _roll(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return float(torch.rand((), generator=generator))
    return float(generator.random()) if hasattr(generator, "random") else float(generator.rand())


class Average(Net):
    """With a frozen moving average of its first layer, kept up by ``write``."""

    def __init__(self, write: Callable[[Tensor, Tensor], None], hide: bool) -> None:
        super().__init__(_average)
        teacher = copy.deepcopy(self.a).requires_grad_(False)
        self.teacher = (teacher,) if hide else teacher
        self.write = write


def _average(net: Any, h: Tensor) -> Tensor:
    teacher = net.teacher[0] if isinstance(net.teacher, tuple) else net.teacher
    with torch.no_grad():
        for p, q in zip(net.a.parameters(), teacher.parameters(), strict=True):
            net.write(q, p + 0.1)
    return 1 + teacher(h).detach().square().mean(1, keepdim=True)


def lerp(q: Tensor, p: Tensor) -> None:
    q.lerp_(p, 0.1)


def lerp_data(q: Tensor, p: Tensor) -> None:
    q.data.mul_(0.9).add_(p, alpha=0.1)


def set_data(q: Tensor, p: Tensor) -> None:
    q.data = 0.9 * q.data + 0.1 * p


OUTSIDE = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, momentum=0.5))  # a module of nobody's


def outside(net: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        OUTSIDE[0].weight.add_(0.01)
        return OUTSIDE(h).tanh() + 2


class Words(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.e, self.b = kind(50, 6, max_norm=0.5), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        words = (x[:, :4].abs() * 20).long().clamp(max=49)
        e = self.e(words)
        return self.b(e if e.ndim == 2 else e.mean(1))


def hooked() -> nn.Module:
    """Stock layers, with hooks of the user's that count and remember."""
    net, seen = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)), []
    statistics, callable_ = Statistics(), Statistics()
    calls = 0

    def count(module: nn.Module, args: tuple, output: Tensor) -> None:
        nonlocal calls
        calls += 1
        seen.append((calls, output.detach()))
        LOG.append(calls)

    net[0].register_forward_hook(count)
    net[1].register_forward_hook(statistics.hook)
    net[0].register_forward_hook(callable_)
    net[2].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    net.register_full_backward_hook(lambda module, gi, go: seen.append(float(go[0].sum())))
    net.__dict__["peek"] = lambda: (calls, seen, statistics.__dict__, callable_.__dict__)
    return net


def noisy(net: Any, h: Tensor) -> Tensor:
    """A function beside the model's class."""
    net.statistics.see(h)
    return 1 + net.statistics.mean.mean()


def elsewhere(net: Any, h: Tensor) -> Tensor:
    """Counters of others' classes."""
    net.space.calls += 1
    net.space.inner.sizes.append(len(h))
    net.space.inner.mean = h.detach().mean(0)
    net.options.seen = {"calls": net.space.calls}
    net.meters["loss"].update(float(h.detach().mean()))
    net.raw[0] += 1
    net.raw.extend(b"x")
    return 1 + net.space.inner.mean + net.meters["loss"].total + next(net.number) + next(net.steps) + net.raw[0]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "rnn": lambda: Recurrent(nn.GRU(6, 6, batch_first=True)),
    "lstm": lambda: Recurrent(nn.LSTM(6, 6, batch_first=True)),
    "counters": lambda: Net(counting, calls=0),
    "containers": lambda: Net(
        containers, seen=defaultdict(dict, sizes=[]), queue=deque(maxlen=3), names=set(), tail=[0.0] * 1500,
        bank={"rows": torch.zeros(64, 6)}, ordered=OrderedDict(a=1, b=2), pair=(0, torch.zeros(2)),
    ),
    "in place": lambda: Net(in_place, cache=torch.zeros(64, 6), view=torch.zeros(8)[::2], array=np.ones(3)),
    "generators": lambda: Net(dice, dice={
        "torch": torch.Generator().manual_seed(1), "python": random.Random(1), "numpy": np.random.default_rng(1),
        "old numpy": np.random.RandomState(1), "coin": random.Random(2).randrange,
    }),
    "object": lambda: Net(noisy, statistics=Statistics()),
    "others' objects": lambda: Net(
        elsewhere, space=SimpleNamespace(calls=0, inner=SimpleNamespace(sizes=[])), options=argparse.Namespace(),
        meters={"loss": AverageMeter()}, raw=bytearray(3), number=itertools.count(), steps=itertools.count(5, -2),
    ),
    "average": lambda: Average(lerp, False),
    "average by .data": lambda: Average(lerp_data, False),
    "average anew": lambda: Average(set_data, False),
    "hidden average": lambda: Average(lerp, True),
    "hidden average by .data": lambda: Average(lerp_data, True),
    "outside": lambda: Net(outside),
    "max_norm": lambda: Words(nn.Embedding),
    "max_norm of bags": lambda: Words(nn.EmbeddingBag),
    "hooks": hooked,
}  # fmt: skip


def everything(x: Any, met: dict[int, Any] | None = None) -> Any:
    """A picture of an object and all that it holds, to be compared."""
    met = {} if met is None else met
    if isinstance(x, Tensor):
        return "tensor", x.dtype, tuple(x.shape), x.detach().flatten().tolist(), x.requires_grad
    if isinstance(x, np.ndarray):
        return "array", x.tolist()
    if isinstance(x, (bool, int, float, str, type(None))):
        return x
    if id(x) in met:
        return "again", met[id(x)][0]
    met[id(x)] = len(met), x
    if isinstance(x, torch.Generator):
        return x.get_state().tolist()
    if isinstance(x, random.Random):
        return x.getstate()
    if isinstance(x, np.random.Generator):
        return repr(x.bit_generator.state)
    if isinstance(x, np.random.RandomState):
        return repr(x.get_state())
    if isinstance(x, dict):
        return type(x).__name__, [(everything(k, met), everything(v, met)) for k, v in x.items()]
    if isinstance(x, set):
        return sorted(map(repr, x))
    if isinstance(x, (tuple, list, deque)):
        return type(x).__name__, [everything(v, met) for v in x]
    if isinstance(x, nn.Module):
        own = {
            k: v for k, v in x.__dict__.items() if not k.endswith(("hooks", "kwargs", "called")) and k not in _TAPPED
        }
        return type(x).__name__, everything(own, met)
    if isinstance(x, (itertools.count, bytearray)):
        return repr(x)
    if isinstance(x, (Statistics, SimpleNamespace, argparse.Namespace, AverageMeter)):
        return everything(x.__dict__, met)
    if getattr(x, "__name__", "") == "<lambda>" and not x.__code__.co_argcount:
        return everything(x(), met)
    if getattr(x, "__self__", None) is not None:
        return everything(x.__self__, met)
    return getattr(x, "__qualname__", type(x).__name__)


_TAPPED = ("forward", "fishleg_aux", "__getstate__", "_replicate_for_data_parallel", "_is_full_backward_hook")


def train(make: Callable[[], nn.Module], optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> list[Any]:
    """A picture of everything after each of some steps that leave the parameters as they are."""
    global COUNT
    COUNT = 0
    LOG.clear()
    random.seed(0)
    np.random.seed(0)
    np.random.randn()  # one of a pair: the other is waiting
    torch.manual_seed(0)
    for layer in OUTSIDE:
        layer.reset_parameters()
    net, pictures = make(), []
    opt = optimizer(net)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        x = torch.randn(40, 6, generator=generator)
        opt.zero_grad()
        loss = net(x).square().sum() / 40
        loss.backward()
        opt.step()
        world = random.getstate(), repr(np.random.get_state()), torch.get_rng_state(), COUNT, LOG, OUTSIDE
        pictures.append((float(loss), everything(net), everything(world)))
    return pictures


@pytest.mark.parametrize("fisher", list(products.FISHER))
@pytest.mark.parametrize("name", MODELS)
def test_training_with_it_leaves_what_training_without_it_leaves(name: str, fisher: str) -> None:
    want = train(MODELS[name], lambda net: torch.optim.SGD(net.parameters(), lr=0))

    def fishleg(net: nn.Module) -> FishLeg:
        return FishLeg(net, likelihood=GaussianLikelihood(), lr=0, fisher=fisher, update_aux_every=2, anchor_every=2)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fisher=")
        got = train(MODELS[name], fishleg)
    for step, (a, b) in enumerate(zip(want, got, strict=True)):
        assert a[0] == b[0] and a[1] == b[1] and a[2] == b[2], step


def test_what_another_thread_adds_stays() -> None:
    net = Net(lambda net, h: None, worker=Worker())
    kept = KeptApart({}, 1000)
    kept.hold([net], [])
    net.worker.waiting.put(1)
    kept.restore()
    assert net.worker.waiting.qsize() == 1 and net.worker.waiting.get() == 1


def test_of_others_objects_so_many_are_followed() -> None:
    net = Net(lambda net, h: None, link=Link(3 * OBJECTS))
    kept = KeptApart({}, 1000)
    kept.hold([net], [])
    links = [net.link]
    while links[-1].next is not None:
        links.append(links[-1].next)
    for link in links:
        link.calls += 1
    kept.restore()
    assert [link.calls for link in links] == [0] * OBJECTS + [1] * (2 * OBJECTS + 1)


def test_own_draw_and_nll_count_the_user_s_calls_alone() -> None:
    calls, seen = 0, []
    likelihood = GaussianLikelihood()

    def draw(model: nn.Module, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return likelihood.draw(model(x))

    def nll(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        seen.append(len(x))
        return likelihood.nll(y, model(x))

    net = nn.Linear(6, 3)
    optimizer = FishLeg(net, draw, nll, update_aux_every=1)
    for _ in range(3):
        nll(net, torch.randn(40, 6), torch.zeros(40, 3)).backward()
        optimizer.step()
    assert calls == 0 and seen == [40] * 3 and optimizer.diagnostics()["aux_steps"] == 3


@pytest.mark.parametrize("coin", ["torch", "python", "numpy", "own"])
def test_both_sides_of_a_difference_are_one_network(coin: str) -> None:
    """Layers dropped by any generator: |F v| by differences is of the size of the exact one's."""
    own = random.Random(0)
    toss = {"torch": lambda: float(torch.rand(())), "python": random.random, "numpy": np.random.rand, "own": own.random}
    net = Net(lambda net, h: 2.0 if toss[coin]() > 0.5 else -1.0).double()
    optimizer = FishLeg(net, likelihood=GaussianLikelihood())
    net(torch.randn(40, 6).double())
    passes, params = optimizer._passes, list(net.parameters())
    vs = [torch.randn_like(p) for p in params]

    def sizes(product: Callable) -> list[float]:
        found = (product(passes, params, vs, passes.inputs()) for _ in range(10))
        return [float(torch.stack([t.norm() for t in ts]).norm()) for ts in found]

    different, exact = sizes(products.antithetic), sizes(products.ggn)
    assert max(different) <= 20 * max(exact)
    if coin != "own":  # which stays where the user left it
        assert len({round(s, 6) for s in exact}) == 2  # and not always the same network


PLACES: dict[str, Callable[[Any], Tensor]] = {
    "parameter 'a.weight'": lambda net: net.a.weight,
    "parameter 'frozen.weight'": lambda net: net.frozen.weight,
    "a large tensor of its own": lambda net: net.bank,
}


@pytest.mark.parametrize("what", PLACES)
def test_what_cannot_be_undone_is_told_once(what: str) -> None:
    """A trainable parameter, and what is large and more than the model."""

    def write(net: Any, h: Tensor) -> None:
        with torch.no_grad():
            PLACES[what](net).mul_(0.99)

    net, likelihood = Net(write, bank=torch.zeros(2**20 + 1)), GaussianLikelihood()
    net.frozen = nn.Linear(1025, 1025).requires_grad_(False)
    optimizer = FishLeg(net, likelihood=likelihood, update_aux_every=1, fisher="rank1")
    with pytest.warns(UserWarning, match=f"writes to {what} in place") as told:
        for _ in range(4):
            likelihood.nll(torch.zeros(40, 3), net(torch.randn(40, 6))).backward()
            optimizer.step()
    assert len([w for w in told if "in place" in str(w.message)]) == 1


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_long_words_of_the_loader_are_not_shortened(kind: type) -> None:
    net, likelihood = Words(kind), GaussianLikelihood()
    before = net.e.weight.detach().clone()
    long = [torch.full((40, 6), 2.0)]
    optimizer = FishLeg(net, likelihood=likelihood, lr=0, aux_loader=long, update_aux_every=10)
    likelihood.nll(torch.zeros(40, 3), net(torch.zeros(40, 6))).backward()  # word 0 alone
    optimizer.step()
    assert torch.equal(net.e.weight[1:], before[1:]) and net.e.max_norm == 0.5
    assert optimizer.diagnostics()["aux_steps"] == 1 and not torch.equal(net.e.weight[0], before[0])
