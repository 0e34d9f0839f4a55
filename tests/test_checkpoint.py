"""Saving and resuming: bit for bit, mid-run, with missing gradients, from a shuffled loader, in low precision."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

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
        (torch.optim.Adam(net.parameters()).state_dict(), "no 'fishleg' entry"),
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
