"""Saving and resuming: bit for bit, mid-run, with missing gradients, from a shuffled loader, in low precision."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from fishleg_fast import CategoricalLikelihood, FishLeg, GaussianLikelihood

LIKELIHOOD = CategoricalLikelihood()


def data(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(12, 6, generator=generator).to(dtype), torch.randint(4, (12,), generator=generator)


class Branches(nn.Module):
    """Only one of two branches is used at a step: the other one's gradients are missing."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.heads = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])
        self.drop = nn.Dropout(0.3)
        self.norm = nn.BatchNorm1d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.branch = 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.norm(torch.tanh(self.body(x))))
        h = h + self.attention(h[:, None], h[:, None], h[:, None], need_weights=False)[0][:, 0]
        return self.heads[self.branch](h)


def train(net: nn.Module, optimizer: FishLeg, steps: range, dtype: torch.dtype = torch.float32) -> None:
    for step in steps:
        if isinstance(net, Branches):
            net.branch = step % 2
        x, y = data(step, dtype)
        optimizer.zero_grad()
        torch.manual_seed(step)
        LIKELIHOOD.nll(y, net(x)).backward()
        optimizer.step()


def saved(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data(99)), batch_size=5, shuffle=True)


CASES: dict[str, tuple[Callable[[], nn.Module], dict, torch.dtype]] = {
    "captured inputs": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), {}, torch.float32),
    "missing gradients": (Branches, {}, torch.float32),
    "shuffled aux_loader": (lambda: nn.Linear(6, 4), {"aux_loader": loader}, torch.float32),
    "bfloat16": (lambda: nn.Linear(6, 4).bfloat16(), {}, torch.bfloat16),
    "sumkron, after, hessian": (
        lambda: nn.Linear(6, 4),
        {"structure": "sumkron", "momentum": "after", "fisher": "hessian"},
        torch.float32,
    ),
    "capturable": (lambda: nn.Linear(6, 4), {"capturable": True}, torch.float32),
}


@pytest.mark.parametrize("case", CASES)
def test_resuming_mid_run_is_bit_for_bit(case: str) -> None:
    build, settings, dtype = CASES[case]

    def make() -> tuple[nn.Module, FishLeg]:
        torch.manual_seed(0)
        net = build()
        options = {k: v() if callable(v) else v for k, v in settings.items()}
        return net, FishLeg(net, likelihood=LIKELIHOOD, update_aux_every=2, anchor_every=4, **options)

    net, optimizer = make()
    train(net, optimizer, range(7), dtype)
    state, weights = saved(optimizer.state_dict()), saved(net.state_dict())
    train(net, optimizer, range(7, 15), dtype)
    other, resumed = make()
    train(other, resumed, range(3), dtype)  # a state to be overwritten
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(other, resumed, range(7, 15), dtype)
    for (name, p), q in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    for a, b in zip(optimizer.blocks, resumed.blocks, strict=True):
        for name in a.structure.fishleg_aux:
            assert torch.equal(a.structure.fishleg_aux[name], b.structure.fishleg_aux[name]), (a.name, name)
    assert optimizer.diagnostics() == resumed.diagnostics()


def test_lambda_keeps_its_precision_beside_low_precision_parameters() -> None:
    torch.manual_seed(0)
    net = nn.Linear(6, 4).bfloat16()
    optimizer = FishLeg(net, likelihood=LIKELIHOOD)
    train(net, optimizer, range(3), torch.bfloat16)
    before = net.fishleg_aux["L"].clone()
    optimizer.load_state_dict(saved(optimizer.state_dict()))
    assert net.fishleg_aux["L"].dtype == torch.float32 and torch.equal(net.fishleg_aux["L"], before)
    assert optimizer.state[net.weight]["fishleg_aux"]["L"] is net.fishleg_aux["L"]


def test_another_optimizers_or_structures_state_is_refused_and_changes_nothing() -> None:
    net = nn.Linear(6, 4)
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, lr=0.5)
    train(net, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    strangers = [
        (torch.optim.Adam(net.parameters()).state_dict(), "no 'fishleg' entry .* start FishLeg without it"),
        (FishLeg(nn.Linear(6, 4), likelihood=LIKELIHOOD, structure="diagonal").state_dict(), "another structure"),
        (FishLeg(nn.Linear(5, 4), likelihood=LIKELIHOOD).state_dict(), "shape"),
        (FishLeg(nn.Linear(6, 4), likelihood=GaussianLikelihood(learn=True)).state_dict(), "2 parameters"),
    ]
    for stranger, message in strangers:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(stranger)
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert torch.equal(before["state"][0]["momentum"], after["state"][0]["momentum"])


def test_scheduler_and_groups_come_back() -> None:
    net = nn.Linear(6, 4)
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    train(net, optimizer, range(2))
    schedule.step()
    state = saved(optimizer.state_dict())
    other = FishLeg(net, likelihood=LIKELIHOOD, lr=7.0)
    other.load_state_dict(state)
    assert other.param_groups[0]["lr"] == pytest.approx(0.05) and other.param_groups[0]["base_lr"] == 0.5


def test_every_parameter_has_an_entry_and_all_else_is_in_the_groups() -> None:
    torch.manual_seed(0)
    net = Branches()
    net.none = nn.Parameter(torch.zeros(0, 3))
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, aux_loader=loader())
    for steps in (0, 3):
        train(net, optimizer, range(steps))
        state = optimizer.state_dict()
        assert set(state) == {"state", "param_groups"}
        assert sorted(state["state"]) == list(range(len(list(net.parameters()))))
        assert all(isinstance(entry.get("step", entry), (Tensor, dict)) for entry in state["state"].values())
    assert state["param_groups"][0]["fishleg"]["loader_taken"] > 0


def test_another_version_is_refused() -> None:
    net = nn.Linear(6, 4)
    optimizer = FishLeg(net, likelihood=LIKELIHOOD)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["fishleg"]["version"] = 99
    with pytest.raises(ValueError, match=r"should be of version 2 but is of: 99; load it with the version of"):
        optimizer.load_state_dict(state)


def test_a_version_1_state_goes_on_drawing_the_same_seeds_whenever_it_is_loaded() -> None:
    net = nn.Linear(6, 4)
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, aux_loader=loader())
    train(net, optimizer, range(3))
    state = saved(optimizer.state_dict())
    now, generator = state["param_groups"][0].pop("fishleg"), torch.Generator().manual_seed(17)
    counts = {name: now[name] for name in ("steps", "aux_steps", "anchors", "skipped_steps", "skipped_aux_steps")}
    place = {"seed": now["loader_seed"], "taken": now["loader_taken"]}
    state["fishleg"] = {"counts": counts, "generator": generator.get_state(), "aux_loader": place}
    drawn = []
    for _ in range(2):
        optimizer.load_state_dict(state)
        drawn.append([optimizer._passes.seed() for _ in range(3)])
        assert optimizer.state_dict()["param_groups"][0]["fishleg"]["draws"] == 3
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 3
    assert optimizer.diagnostics()["steps"] == 3 and optimizer._passes.loader.state() == place


CHECKPOINTED: dict[str, tuple[Callable[[], nn.Module], dict]] = {
    "plain": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), {}),
    "missing gradients, parts of parameters": (Branches, {}),
    "loader": (lambda: nn.Linear(6, 4), {"aux_loader": loader}),
    "every fisher's own draws": (lambda: nn.Linear(6, 4), {"fisher": "antithetic", "structure": "sumkron"}),
    "capturable, diagonal": (lambda: nn.Linear(6, 4), {"capturable": True, "structure": "diagonal"}),
}


@pytest.mark.parametrize("option", ["none", "flatten_optimizer_state_dict", "full_state_dict"])
@pytest.mark.parametrize("case", CHECKPOINTED)
def test_torch_distributed_checkpoints_resume(case: str, option: str) -> None:
    """``get_optimizer_state_dict`` and ``set_optimizer_state_dict`` of one process, before and after some steps.

    Not with both options, with which torch 2.13 loads no optimizer's.
    """
    options = StateDictOptions(**({} if option == "none" else {option: True}))
    build, settings = CHECKPOINTED[case]

    def make() -> tuple[nn.Module, FishLeg]:
        torch.manual_seed(0)
        net = build()
        options = {k: v() if callable(v) else v for k, v in settings.items()}
        return net, FishLeg(net, likelihood=LIKELIHOOD, update_aux_every=2, anchor_every=4, **options)

    net, optimizer = make()
    train(net, optimizer, range(5))
    state = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=options))
    other, resumed = make()
    start = [p.clone() for p in other.parameters()]
    fresh = copy.deepcopy(get_optimizer_state_dict(other, resumed, options=options))  # this may take a step
    set_optimizer_state_dict(other, resumed, fresh, options=options)
    assert all(torch.equal(p, q) for p, q in zip(start, other.parameters(), strict=True))
    assert resumed.diagnostics()["steps"] == resumed._passes.generator.get_state()[1] == 0
    set_optimizer_state_dict(other, resumed, state, options=options)
    other.load_state_dict(net.state_dict())
    train(net, optimizer, range(5, 10))
    train(other, resumed, range(5, 10))
    for (name, p), q in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)
    assert {**optimizer.diagnostics(), "aux_loss": 0, "grad_norm": 0, "nat_norm": 0} == {
        **resumed.diagnostics(), "aux_loss": 0, "grad_norm": 0, "nat_norm": 0
    }  # fmt: skip


@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
def test_frozen_parameters_beside_trained_ones(frozen: str) -> None:
    """torch.distributed leaves the state of frozen parameters out."""
    names = ["weight", "bias"] if frozen == "both" else [frozen]

    def make() -> tuple[nn.Module, FishLeg]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        optimizer = FishLeg(net, likelihood=LIKELIHOOD)
        train(net, optimizer, range(2))
        for name in names:
            getattr(net[0], name).requires_grad_(False)
        return net, optimizer

    (net, optimizer), (other, resumed) = make(), make()
    train(net, optimizer, range(2, 5))
    state = copy.deepcopy(get_optimizer_state_dict(net, optimizer))
    set_optimizer_state_dict(other, resumed, state)
    other.load_state_dict(net.state_dict())
    train(net, optimizer, range(5, 8))
    train(other, resumed, range(5, 8))
    for (name, p), q in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
def test_a_checkpoint_on_disk_by_torch_distributed(tmp_path: Path) -> None:
    from torch.distributed import checkpoint

    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        net = Branches()
        nets.append((net, FishLeg(net, likelihood=LIKELIHOOD, update_aux_every=2)))
    (net, optimizer), (other, resumed) = nets
    train(net, optimizer, range(5))
    written = {"optimizer": get_optimizer_state_dict(net, optimizer), "model": net.state_dict()}
    checkpoint.save(written, checkpoint_id=str(tmp_path), no_dist=True)
    train(other, resumed, range(2))
    read = {"optimizer": get_optimizer_state_dict(other, resumed), "model": other.state_dict()}
    checkpoint.load(read, checkpoint_id=str(tmp_path), no_dist=True)
    set_optimizer_state_dict(other, resumed, read["optimizer"])
    other.load_state_dict(read["model"])
    train(net, optimizer, range(5, 8))
    train(other, resumed, range(5, 8))
    for (name, p), q in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


def test_moments_of_adam_come_and_go_with_learning() -> None:
    """Where λ was learned it goes on as it was saved; where it was not, Adam begins anew."""

    def make(**settings: int) -> tuple[nn.Module, FishLeg]:
        torch.manual_seed(0)
        net = nn.Linear(6, 4)
        return net, FishLeg(net, likelihood=LIKELIHOOD, **settings)

    (net, learned), (other, plain) = make(update_aux_every=2), make()
    train(net, learned, range(5)), train(other, plain, range(5))
    assert not plain.blocks[0].exp_avg and learned.blocks[0].exp_avg["R"].any()
    plain.load_state_dict(saved(learned.state_dict()))
    assert torch.equal(plain.blocks[0].exp_avg["R"], learned.blocks[0].exp_avg["R"])
    _, fresh = make()
    fresh.load_state_dict(saved(make()[1].state_dict()))
    assert not fresh.blocks[0].exp_avg
    learned.load_state_dict(saved(make()[1].state_dict()))
    assert not any(t.any() for t in learned.blocks[0].exp_avg.values())


def test_a_load_that_torch_refuses_allocates_nothing() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    learned = FishLeg(net, likelihood=LIKELIHOOD, update_aux_every=1)
    train(net, learned, range(2))
    groups = [{"params": list(net[0].parameters())}, {"params": list(net[1].parameters())}]
    plain = FishLeg(net, likelihood=LIKELIHOOD, params=groups)
    with pytest.raises(ValueError, match="parameter groups"):
        plain.load_state_dict(learned.state_dict())
    assert not any(b.exp_avg for b in plain.blocks)
