"""Parameters that come and go in the model and in its groups: none is silently left untrained."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fishleg_fast import CategoricalLikelihood, FishLeg
from support.classifier import LIKELIHOOD, data, make, same, train, weights


class Net(nn.Module):
    """Layers of several kinds, and parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(5, 6))
        self.first = nn.Linear(5, 8)
        self.conv = nn.Conv1d(1, 2, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Sequential(nn.Tanh(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x @ self.points.T))
        h = self.norm(h + self.attention(h[:, None], h[:, None], h[:, None], need_weights=False)[0][:, 0])
        return self.head(self.conv(h[:, None]).flatten(1))


def owner(net: nn.Module, path: str) -> tuple[nn.Module, str]:
    module, _, name = path.rpartition(".")
    return net.get_submodule(module), name


def renew(net: nn.Module, optimizer: FishLeg, *paths: str) -> list[nn.Parameter]:
    """New parameters of the same values, in the model and in the groups."""
    made = []
    for path in paths:
        module, name = owner(net, path)
        old = getattr(module, name)
        new = nn.Parameter(old.detach().clone())
        setattr(module, name, new)
        for group in optimizer.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]
        made.append(new)
    return made


def follow(net: nn.Module, settings: dict) -> FishLeg:
    return FishLeg(net, likelihood=LIKELIHOOD, normalize="rms", **settings)


SETTINGS = {"init": "sgd", "anchor_every": 0, "update_aux_every": 0}  # each block by itself, from Q = I


@pytest.mark.parametrize(
    "paths, names",
    [
        (["points"], {"points"}),
        (["first.weight"], {"first"}),
        (["first.bias"], {"first"}),
        (["conv.weight", "conv.bias"], {"conv"}),
        (["attention.in_proj_weight"], {"attention.q", "attention.k", "attention.v"}),
        (["norm.bias", "head.1.weight"], {"norm", "head.1"}),
    ],
)
def test_a_new_parameter_starts_anew_and_the_others_go_on(paths: list[str], names: set[str]) -> None:
    """Against the step of an optimizer made anew, and that of one where nothing was replaced."""
    torch.manual_seed(0)
    net = Net()
    optimizer = follow(net, SETTINGS)
    train(net, optimizer, 3)
    kept, fresh = copy.deepcopy(net), copy.deepcopy(net)
    going_on = follow(kept, SETTINGS)
    going_on.load_state_dict(optimizer.state_dict())
    before = {b.name: b for b in optimizer.blocks}
    renew(net, optimizer, *paths)
    for each, its in ((net, optimizer), (kept, going_on), (fresh, follow(fresh, SETTINGS))):
        train(each, its, 1, start=3)
    assert {b.name for b in optimizer.blocks if before[b.name] is not b} == names
    found = [dict(each.named_parameters()) for each in (net, kept, fresh)]
    new = {id(p) for b in optimizer.blocks if b.name in names for p in b.params}
    for name, p in found[0].items():
        assert torch.equal(p, found[2 if id(p) in new else 1][name]), name
        assert not torch.equal(found[1][name], found[2][name]), name  # or this would tell nothing
    assert set(map(id, optimizer.state)) == set(map(id, net.parameters()))


@pytest.mark.parametrize("anchor_from", ["drawn", "training"])
def test_a_parameter_may_grow_while_lambda_is_learned(anchor_from: str) -> None:
    torch.manual_seed(0)
    net = Net()
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, update_aux_every=2, anchor_every=3, anchor_from=anchor_from)
    train(net, optimizer, 4)
    for step in range(4, 10, 2):
        old = net.points
        net.points = nn.Parameter(torch.cat([old.detach(), torch.randn(2, 6)]))
        wide = nn.Linear(net.points.shape[0], 8)
        (group,) = optimizer.param_groups
        gone = {id(p) for p in (old, *net.first.parameters())}
        net.first = wide
        group["params"] = [p for p in group["params"] if id(p) not in gone] + [net.points, *wide.parameters()]
        start = weights(net)
        train(net, optimizer, 2, start=step)
        assert not any(torch.equal(p, q) for p, q in zip(start, net.parameters(), strict=True))
    assert net.first.fishleg_aux["L"].shape == (12, 12) and optimizer.diagnostics()["skipped_steps"] == 0
    assert len(optimizer.blocks) == 9 and len(optimizer.diagnostics()["nat_norm"]) == 9


def grow(net: nn.Sequential) -> None:
    net[0].weight = nn.Parameter(net[0].weight.detach().clone())


def new_head(net: nn.Sequential) -> None:
    net[2] = nn.Linear(12, 4)


@pytest.mark.parametrize("change, name", [(grow, "0.weight"), (new_head, "2.weight")])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("call", ["step", "state_dict"])
def test_what_replaced_a_groups_parameter_and_is_in_none_is_told(
    change: Callable, name: str, set_to_none: bool, call: str
) -> None:
    net, optimizer = make(update_aux_every=1)
    train(net, optimizer, 2)
    optimizer.zero_grad(set_to_none=set_to_none)
    change(net)
    x, y = data(2)
    LIKELIHOOD.nll(y, net(x)).backward()
    before = weights(net)
    with pytest.raises(ValueError, match=rf"was '{name}' of the model, which has another .*add_param_group"):
        getattr(optimizer, call)()
    assert same(before, weights(net))
    if change is new_head:  # the remedy that the message has, with the old head's parameters left where they are
        optimizer.add_param_group({"params": net[2].parameters()})
        train(net, optimizer, 1, start=2)
        assert not any(torch.equal(p, q) for p, q in zip(before, net.parameters(), strict=True))
        assert len(optimizer.blocks) == 2


def test_a_groups_stranger_is_told() -> None:
    net, optimizer = make()
    train(net, optimizer, 1)
    optimizer.param_groups[0]["params"][2] = nn.Parameter(torch.zeros(7, 3))
    for call in (optimizer.step, optimizer.state_dict):
        with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[2\] should be .*of shape: \(7, 3\)"):
            call()


def test_what_left_the_groups_is_let_go_of_and_may_come_back() -> None:
    net, optimizer = make()
    train(net, optimizer, 2)
    (block,) = [weakref.ref(b) for b in optimizer.blocks if b.name == "2"]
    head = list(net[2].parameters())
    optimizer.param_groups[0]["params"] = list(net[0].parameters())
    train(net, optimizer, 1, start=2)
    gc.collect()
    assert block() is None and len(net[2].fishleg_aux) == 0 and not net[2]._forward_hooks
    assert set(map(id, optimizer.state)) == set(map(id, net[0].parameters()))
    before = weights(net)
    train(net, optimizer, 1, start=3)
    assert same(before[2:], weights(net)[2:])
    optimizer.add_param_group({"params": head})
    train(net, optimizer, 1, start=4)
    assert not any(torch.equal(p, q) for p, q in zip(before, net.parameters(), strict=True))


def test_all_may_leave() -> None:
    net, optimizer = make()
    train(net, optimizer, 1)
    optimizer.param_groups.clear()
    before = weights(net)
    train(net, optimizer, 1, start=1)
    assert same(before, weights(net)) and not optimizer.blocks


def test_another_optimizers_lambda_stays_reachable() -> None:
    net, _ = make()
    first = FishLeg(net, likelihood=LIKELIHOOD, params=net[0].parameters())
    second = FishLeg(net, likelihood=LIKELIHOOD, params=net[2].parameters())
    train(net, first, 1)
    first.param_groups.clear()
    train(net, first, 1)
    assert not net[0].fishleg_aux and net[2].fishleg_aux["L"] is second.blocks[0].structure.fishleg_aux["L"]


def test_a_branch_without_gradients_and_a_module_that_is_gone_are_no_fault() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(6, 4)})
    likelihood = CategoricalLikelihood()
    optimizer = FishLeg(net, draw=lambda m, x: torch.zeros(len(x), dtype=torch.long), fisher="rank1",
                        nll=lambda m, x, y: likelihood.nll(y, m["a"](x)), aux_loader=[torch.randn(8, 6)])  # fmt: skip

    def step(name: str) -> None:
        optimizer.zero_grad()
        likelihood.nll(data(0)[1], net[name](data(0)[0])).backward()
        optimizer.step()

    step("a")
    step("b")
    assert len(optimizer.blocks) == 2
    del net["b"]
    step("a")
    assert [b.name for b in optimizer.blocks] == ["a"]


def head_of_two(net: nn.Sequential) -> None:
    net[2] = nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 4))


def bottleneck_of_one(net: nn.Sequential) -> None:
    net[0] = nn.Sequential(nn.Linear(6, 12))


def weight_norm(net: nn.Sequential) -> None:
    nn.utils.parametrizations.weight_norm(net[2])


def another_name(net: nn.Sequential) -> None:
    del net[2]
    net.append(nn.Identity())
    net.append(nn.Linear(12, 4))


CONTAINERS: dict[str, tuple[Callable[[nn.Sequential], None], str, list[str]]] = {
    "head": (head_of_two, "2.weight", ["2.0.weight", "2.0.bias", "2.1.weight", "2.1.bias"]),
    "first": (bottleneck_of_one, "0.weight", ["0.0.weight", "0.0.bias"]),
    "weight_norm": (
        weight_norm,
        "2.weight",
        ["2.parametrizations.weight.original0", "2.parametrizations.weight.original1"],
    ),
    "another name": (another_name, "2.weight", ["3.weight", "3.bias"]),
}


def step_on(net: nn.Module, optimizer: FishLeg) -> None:
    x, y = data(0)
    optimizer.zero_grad()
    LIKELIHOOD.nll(y, net(x)).backward()
    optimizer.step()


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("remedy", ["one group", "a group each", "frozen", "taken out"])
def test_what_came_elsewhere_as_a_groups_parameter_left_is_told(kind: str, remedy: str) -> None:
    change, left, came = CONTAINERS[kind]
    net, optimizer = make(update_aux_every=1)
    train(net, optimizer, 2)
    change(net)
    before = weights(net)
    named = dict(net.named_parameters())
    with pytest.raises(
        ValueError, match=rf"was '{left}' .*in no group: {', '.join(map(repr, came))}; .*add_param_group"
    ):
        step_on(net, optimizer)
    assert same(before, weights(net))
    if remedy == "one group":
        optimizer.add_param_group({"params": [named[name] for name in came]})
    elif remedy == "a group each":
        for name in came:
            optimizer.add_param_group({"params": named[name]})
    elif remedy == "frozen":
        for name in came:
            named[name].requires_grad_(False)
    else:
        inside = set(map(id, net.parameters()))
        optimizer.param_groups[0]["params"] = [p for p in optimizer.param_groups[0]["params"] if id(p) in inside]
    for _ in range(2):
        step_on(net, optimizer)
    moved = {name for (name, p), old in zip(net.named_parameters(), before, strict=True) if not torch.equal(p, old)}
    assert moved == (set(named) if "group" in remedy else set(named) - set(came))


@pytest.mark.parametrize("kind", CONTAINERS)
def test_only_some_of_what_came_is_in_a_group(kind: str) -> None:
    change, _, came = CONTAINERS[kind]
    net, optimizer = make()
    train(net, optimizer, 2)
    change(net)
    named = dict(net.named_parameters())
    optimizer.add_param_group({"params": [named[came[0]]]})
    with pytest.raises(ValueError, match=rf"in no group: {', '.join(map(repr, came[1:]))};"):
        step_on(net, optimizer)


def test_parameters_of_no_group_from_the_start_are_the_users_own_choice() -> None:
    net, _ = make()
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, params=net[2].parameters())
    before = weights(net)
    step_on(net, optimizer)
    net[2] = nn.Identity()
    step_on(net, optimizer)
    assert same(before[:2], weights(net)) and not optimizer.blocks


def new_dict(optimizer: FishLeg, *paths: str) -> None:
    optimizer.state = defaultdict(dict)


def clear(optimizer: FishLeg, *paths: str) -> None:
    optimizer.state.clear()


def pop(optimizer: FishLeg, *paths: str) -> None:
    for path in paths:
        del optimizer.state[optimizer.model.get_parameter(path)]


EVERYTHING = {
    "points",
    "first",
    "conv",
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.out_proj",
    "norm",
    "head.1",
}


@pytest.mark.parametrize("call", ["step", "state_dict", "load"])
@pytest.mark.parametrize(
    "forget, paths, names",
    [
        (new_dict, [], EVERYTHING),
        (clear, [], EVERYTHING),
        (pop, ["points"], {"points"}),
        (pop, ["first.bias"], {"first"}),
        (pop, ["conv.weight", "conv.bias", "norm.weight"], {"conv", "norm"}),
        (pop, ["attention.in_proj_bias"], {"attention.q", "attention.k", "attention.v"}),
    ],
)
def test_what_lost_its_state_starts_anew(forget: Callable, paths: list[str], names: set[str], call: str) -> None:
    torch.manual_seed(0)
    net = Net()
    optimizer = follow(net, SETTINGS)
    train(net, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    kept, fresh = copy.deepcopy(net), copy.deepcopy(net)
    going_on = follow(kept, SETTINGS)
    going_on.load_state_dict(saved)
    before = {b.name: b for b in optimizer.blocks}
    forget(optimizer, *paths)
    if call == "state_dict":
        assert {int(entry["step"]) for entry in optimizer.state_dict()["state"].values() if "step" in entry} <= {0, 3}
    elif call == "load":  # what is loaded counts
        optimizer.load_state_dict(saved)
    for each, its in ((net, optimizer), (kept, going_on), (fresh, follow(fresh, SETTINGS))):
        train(each, its, 1, start=3)
    assert {b.name for b in optimizer.blocks if before[b.name] is not b} == names
    found = [dict(each.named_parameters()) for each in (net, kept, fresh)]
    anew = {id(p) for b in optimizer.blocks if b.name in names for p in b.params}
    for name, p in found[0].items():
        assert torch.equal(p, found[2 if id(p) in anew and call != "load" else 1][name]), name
        assert not torch.equal(found[1][name], found[2][name]), name
    assert set(map(id, optimizer.state)) == set(map(id, net.parameters()))


def test_what_the_user_adds_to_the_state_is_no_loss() -> None:
    net, optimizer = make()
    train(net, optimizer, 2)
    before = list(optimizer.blocks)
    optimizer.state["mine"] = {"note": 1}
    train(net, optimizer, 2, start=2)
    assert optimizer.blocks == before and optimizer.state["mine"] == {"note": 1}
