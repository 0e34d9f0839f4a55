"""What a step meets around it: empty batches, warnings that are errors, compilers, schedulers, averaged weights."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

from fishleg_fast import CategoricalLikelihood, FishLeg
from support.classifier import LIKELIHOOD, data, make, same, train, weights

EMPTY = torch.zeros(0, 6)


def step(net: nn.Module, optimizer: FishLeg, x: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
    optimizer.zero_grad()
    loss(net(x)).backward()
    optimizer.step()


@pytest.mark.parametrize("fisher", ["ggn", "hessian", "antithetic", "rank1"])
@pytest.mark.parametrize("first", [True, False])
def test_an_empty_batch_teaches_no_curvature(fisher: str, first: bool) -> None:
    """A step is taken, but λ stays; the next batch is learned from as ever."""
    net, optimizer = make(fisher=fisher, update_aux_every=1, anchor_every=2)
    if not first:
        train(net, optimizer, 2)
    before = [{k: t.clone() for k, t in b.structure.fishleg_aux.items()} for b in optimizer.blocks]
    counts, start = optimizer.diagnostics(), weights(net)
    step(net, optimizer, EMPTY, lambda out: out.square().sum())
    for block, aux in zip(optimizer.blocks, before, strict=True):
        assert all(torch.equal(t, aux[name]) for name, t in block.structure.fishleg_aux.items())
    told = optimizer.diagnostics()
    names = ("steps", "aux_steps", "anchors", "skipped_steps", "skipped_aux_steps")
    assert [told[name] - counts[name] for name in names] == [1, 0, 0, 0, 0]
    assert same(start, weights(net))  # without a gradient none moves
    train(net, optimizer, 2, start=2)
    assert optimizer.diagnostics()["aux_steps"] == counts["aux_steps"] + 2 and optimizer.diagnostics()["anchors"]
    assert not optimizer.diagnostics()["skipped_aux_steps"]


def test_an_empty_batch_of_the_loader_too_and_in_pretraining_it_is_told() -> None:
    net, _ = make()
    batches = [(torch.randn(8, 6),), (EMPTY,), (torch.randn(8, 6),)]
    pure = {"anchor_every": 0, "init": "sgd", "aux_update": "adam"}
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, aux_loader=batches, update_aux_every=1, **pure)
    train(net, optimizer, 6)
    assert optimizer.diagnostics()["steps"] == 6 and optimizer.diagnostics()["aux_steps"] == 4
    with pytest.raises(ValueError, match="a curvature batch should have samples but has none"):
        FishLeg(net, likelihood=LIKELIHOOD, aux_loader=[(EMPTY,)], **pure).pretrain_aux(1)


def test_an_empty_batch_leaves_the_moments_of_training_alone() -> None:
    net, optimizer = make(anchor_from="training", anchor_every=1)
    train(net, optimizer, 2)

    def moments() -> list[Tensor]:
        return [t.clone() for b in optimizer.blocks for t in b.moments.values()]

    before = moments()
    step(net, optimizer, EMPTY, lambda out: out.square().sum())
    assert same(before, moments())
    train(net, optimizer, 1, start=2)
    assert not any(torch.equal(a, b) for a, b in zip(before, moments(), strict=True))


def alternate(net: nn.Module, optimizer: FishLeg, pattern: list[int], steps: range) -> list[tuple[int, int]]:
    """(aux_steps, anchors) after each step, of batches that are empty where the pattern has a zero."""
    counts = []
    for k in steps:
        x, y = data(k)
        if pattern[k % len(pattern)]:
            step(net, optimizer, x, partial(LIKELIHOOD.nll, y))
        else:
            step(net, optimizer, EMPTY, lambda out: out.square().sum())
        counts.append((optimizer.diagnostics()["aux_steps"], optimizer.diagnostics()["anchors"]))
    return counts


@pytest.mark.parametrize("anchor_from", ["drawn", "training"])
@pytest.mark.parametrize("pattern", [[0, 1], [0, 0, 1], [0, 0, 0, 0, 1], [0, 1, 1, 0]])
@pytest.mark.parametrize("updates, anchors", [(2, 4), (4, 2), (5, 0), (0, 3), (-2, 4)])
def test_what_falls_on_an_empty_batch_is_due_at_the_next(
    updates: int, anchors: int, pattern: list[int], anchor_from: str
) -> None:
    """Once, however often it fell there; also in a run that is resumed meanwhile."""
    settings = dict(update_aux_every=updates, anchor_every=anchors, anchor_from=anchor_from, aux_update="adam")
    settings["damping_scale"] = "relative"
    expected, told, owed_update, owed_anchor, started = [], [0, 0], 0, False, False
    for k in range(24):
        owed_update = max(owed_update, -updates if updates < 0 else int(updates > 0 and k % updates == 0))
        owed_anchor = owed_anchor or bool(anchors and k and k % anchors == 0) or not started
        if pattern[k % len(pattern)]:
            told = [told[0] + owed_update, told[1] + owed_anchor]
            owed_update, owed_anchor, started = 0, False, True
        expected.append(tuple(told))
    net, optimizer = make(**settings)
    assert alternate(net, optimizer, pattern, range(24)) == expected
    first, state = make(**settings)
    alternate(first, state, pattern, range(9))
    second, resumed = make(**settings)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(state.state_dict())
    assert alternate(second, resumed, pattern, range(9, 24)) == expected[9:]
    assert same(weights(net), weights(second))


def test_what_is_not_empty_though_a_tensor_of_it_is() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            return self.layer(x.index_add(0, edges[0], x[edges[1]]))

    net = Graph()
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, update_aux_every=1)
    for _ in range(3):
        optimizer.zero_grad()
        LIKELIHOOD.nll(data(0)[1], net(data(0)[0], torch.zeros(2, 0, dtype=torch.long))).backward()
        optimizer.step()
    assert optimizer.diagnostics()["aux_steps"] == 3


SCRIPT = """
import torch
from torch import nn
from fishleg_fast import CategoricalLikelihood, FishLeg
net = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 3))
likelihood = CategoricalLikelihood()
optimizer = FishLeg(net, likelihood=likelihood, update_aux_every=1, anchor_every=2)
for step in range(3):
    optimizer.zero_grad()
    likelihood.nll(torch.zeros(8, dtype=torch.long), net(torch.randn(8, 4))).backward()
    optimizer.step()
told = optimizer.diagnostics()
print(told["steps"], told["aux_steps"], told["skipped_steps"])
"""


def test_a_process_whose_warnings_are_errors() -> None:
    """torch itself warns of its own, when it loads forward mode."""
    command = [sys.executable, "-W", "error", "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == ["3", "3", "0"], done.stderr[-2000:]


class NoForward(torch.autograd.Function):
    """The identity, without a forward derivative."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


class Awkward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.outside(NoForward.apply(torch.tanh(self.inside(x))))


def spoilt(step: int) -> float:
    """What multiplies the loss."""
    return float("nan") if step in (1, 3) else 1.0


def never(step: int) -> float:
    return 1.0


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("build, factor", [(Awkward, never), (lambda: nn.Linear(6, 4), spoilt), (Awkward, spoilt)])
def test_a_step_that_warns_is_taken_whole(build: Callable, factor: Callable, capturable: bool) -> None:
    """With warnings as errors it raises at its end: all else is as where warnings are ignored."""
    results = []
    for action in ("ignore", "error"):
        torch.manual_seed(0)
        net, told = build(), 0
        optimizer = FishLeg(net, likelihood=LIKELIHOOD, update_aux_every=1, anchor_every=2, capturable=capturable)
        with warnings.catch_warnings():
            warnings.simplefilter(action, UserWarning)
            for number in range(5):
                x, y = data(number)
                optimizer.zero_grad()
                (LIKELIHOOD.nll(y, net(x)) * factor(number)).backward()
                try:
                    optimizer.step()
                except UserWarning:
                    told += 1
        results.append((weights(net), optimizer.diagnostics(), told))
    (a, counts, quiet), (b, same_counts, told) = results
    assert same(a, b) and repr(counts) == repr(same_counts)
    expected = (build is Awkward) + (factor is spoilt and not capturable)
    assert quiet == 0 and told == expected


def test_warnings_are_of_the_callers_line() -> None:
    net, optimizer = make()
    x, y = data(0)
    (LIKELIHOOD.nll(y, net(x)) * float("nan")).backward()
    with pytest.warns(UserWarning, match="the gradient is not finite") as told:
        optimizer.step()
    assert told[0].filename == __file__
    torch.manual_seed(0)
    optimizer = FishLeg(net := Awkward(), likelihood=LIKELIHOOD)
    net(x)
    with pytest.warns(UserWarning) as told:
        optimizer.pretrain_aux(1)
    assert {warning.filename for warning in told} == {__file__}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("where", ["model", "traced", "part", "added"])
def test_scripted_models_are_told(where: str) -> None:
    part = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    told = r"parameter '.*0\.weight' should be of a module that Python runs, but is of a scripted one"
    if where == "added":
        net = nn.Sequential(torch.jit.script(part), nn.Linear(6, 4))
        optimizer = FishLeg(net, likelihood=LIKELIHOOD, params=net[1].parameters())
        train(net, optimizer, 2)  # what is not trained may be scripted
        with pytest.raises(TypeError, match=told):
            optimizer.add_param_group({"params": net[0].parameters()})
        return
    models = {
        "model": lambda: torch.jit.script(part),
        "traced": lambda: torch.jit.trace(part, torch.randn(2, 6)),
        "part": lambda: nn.Sequential(nn.Linear(6, 6), torch.jit.script(part)),
    }
    with pytest.raises(TypeError, match=told):
        FishLeg(models[where](), likelihood=LIKELIHOOD)


def backward(net: nn.Module, optimizer: FishLeg, number: int) -> Tensor:
    x, y = data(number)
    optimizer.zero_grad()
    loss = LIKELIHOOD.nll(y, net(x))
    loss.backward()
    return loss


@pytest.mark.parametrize("closure", [False, True])
def test_a_compiled_step_is_the_step(closure: bool) -> None:
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        net, optimizer = make(update_aux_every=1)
        call = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for number in range(3):
            loss = partial(backward, net, optimizer, number)
            if closure:
                assert call(loss).requires_grad
            else:
                loss()
                call()
        results.append(weights(net))
    assert same(*results)


SCHEDULES: dict[str, Callable[[FishLeg], lr_scheduler.LRScheduler]] = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.02, total_steps=8),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=3),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_that_cycle_momentum(name: str) -> None:
    """Their defaults; against the same rates and beta, set by hand."""
    net, optimizer = make()
    schedule = SCHEDULES[name](optimizer)
    seen = []
    for number in range(6):
        (group,) = optimizer.param_groups
        train(net, optimizer, 1, start=number)
        seen.append((group["lr"], group["beta"]))
        assert group["beta"] == group["momentum"]
        schedule.step()
        if number == 3:  # on the way, between a step of the schedule and one of the optimizer's
            optimizer.load_state_dict(optimizer.state_dict())
    other, plain = make()
    for number, (lr, beta) in enumerate(seen):
        plain.param_groups[0].update(lr=lr, beta=beta)
        train(other, plain, 1, start=number)
    assert len(set(seen)) > 4 and same(weights(net), weights(other))


def test_beta_of_a_group_by_either_name() -> None:
    net, _ = make()
    groups = [{"params": net[0].parameters(), "momentum": 0.5}, {"params": net[2].parameters(), "beta": 0.7}]
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, params=groups)
    train(net, optimizer, 1)
    assert [b.beta for b in optimizer.blocks] == [0.5, 0.7]
    optimizer.param_groups[0]["beta"], optimizer.param_groups[1]["momentum"] = 0.6, 0.8
    train(net, optimizer, 1)
    assert [b.beta for b in optimizer.blocks] == [0.6, 0.8]
    assert [(g["beta"], g["momentum"]) for g in optimizer.param_groups] == [(0.6, 0.6), (0.8, 0.8)]
    with pytest.raises(ValueError, match="beta should be"):
        FishLeg(net, likelihood=LIKELIHOOD, params=[{"params": net.parameters(), "momentum": 1.5}])


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
        lambda o: lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 4)], [2]
        ),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
        lambda o: swa_utils.SWALR(o, 1e-3, anneal_epochs=2),
    ],
)
def test_other_schedules(schedule: Callable) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler.step.*")
        net, optimizer = make(lr=0.02)
        scheduler = schedule(optimizer)
        rates = []
        for number in range(5):
            train(net, optimizer, 1, start=number)
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    assert len(set(rates)) > 1 and all(torch.isfinite(p).all() for p in net.parameters())


def test_averaged_weights() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    optimizer = FishLeg(net, likelihood=CategoricalLikelihood())
    averaged, sums, n = swa_utils.AveragedModel(net), [torch.zeros_like(p) for p in net.parameters()], 4
    for number in range(n):
        train(net, optimizer, 1, start=number)
        averaged.update_parameters(net)
        sums = [s + p.detach() for s, p in zip(sums, net.parameters(), strict=True)]
    for s, p in zip(sums, averaged.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), s / n)
    swa_utils.update_bn([data(k)[0] for k in range(2)], averaged)
    assert not torch.equal(averaged(data(0)[0]), net(data(0)[0]))
    assert train(net, optimizer, 1)
