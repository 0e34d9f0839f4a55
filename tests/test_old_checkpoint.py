"""A checkpoint written by an earlier version, before the package had folders, loads and trains on.

tests/data/flat-modules.pt: the optimizer's state_dict after five steps of ``train`` below, the model's before and after
five more, and all batches. Written at commit a13e9b6 with backend="cpp", torch 2.13.0, in float64.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fishleg_fast import CategoricalLikelihood, FishLeg, SumKron
from support.dense import relative

WRITTEN = Path(__file__).with_name("data") / "flat-modules.pt"


class Net(nn.Module):
    """A layer of each kind, with low-rank gradients and dense ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.conv = nn.Conv1d(6, 4, 3, padding=1)
        self.wide = nn.Linear(4, 24)
        self.summed = nn.Linear(24, 9)
        self.diagonal = nn.Linear(9, 7)
        self.head = nn.Linear(7, 5)
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = torch.tanh(self.wide(self.conv(x.mT).mean(-1)))
        return self.head(torch.tanh(self.diagonal(torch.tanh(self.summed(x))))) * self.scale


def fishleg(net: Net, backend: str) -> FishLeg:
    structure = {"summed": partial(SumKron, terms=2), "head": "diagkron", "diagonal": "diagonal", "*": "kron"}
    wide = {"params": [*net.wide.parameters()], "lr": 0.02, "weight_decay": 0.1}
    rest = {"params": [p for name, p in net.named_parameters() if not name.startswith("wide")]}
    return FishLeg(
        net, likelihood=CategoricalLikelihood(), params=[wide, rest], lr=1e-2, structure=structure, update_aux_every=2,
        anchor_every=4, max_factor_size=16, seed=3, backend=backend, damping_scale="absolute", damping=0.1,
        normalize="rms", curvature_batch=32, learn_scale=True,
    )  # fmt: skip


def train(net: Net, optimizer: FishLeg, batches: list[tuple[Tensor, Tensor]]) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        CategoricalLikelihood().nll(y, net(x)).backward()
        optimizer.step()


def leaves(state: Any, path: str = "") -> dict[str, Any]:
    """Everything in nested dicts and lists, by where it is."""
    if isinstance(state, (dict, list)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for key, value in items for k, v in leaves(value, f"{path}/{key}").items()}
    return {path: state}


@pytest.fixture(params=["reference", "cpp"])
def resumed(request: pytest.FixtureRequest) -> tuple[dict[str, Any], Net, FishLeg]:
    written = torch.load(WRITTEN, weights_only=True)
    net = Net().double()
    net.load_state_dict(written["model"])
    optimizer = fishleg(net, request.param)
    optimizer.load_state_dict(written["optimizer"])
    return written, net, optimizer


def test_every_number_is_as_it_was(resumed: tuple[dict[str, Any], Net, FishLeg]) -> None:
    """In today's layout, where the counters are in the first group; the generator goes on from a seed that it draws."""
    written, _, optimizer = resumed
    state = optimizer.state_dict()
    now = {f"/fishleg/counts/{name}": value for name, value in state["param_groups"][0].pop("fishleg").items()}
    old, new = leaves(written["optimizer"]), {**leaves(state), **now}
    generator = torch.Generator()
    generator.set_state(old.pop("/fishleg/generator"))
    assert old.pop("/fishleg/aux_loader") is None
    old["/fishleg/counts/seed"] = int(torch.randint(2**62, (), generator=generator))
    assert any("/product" in path for path in old) and any("/q/" in path for path in old)
    assert len(old) > 100
    for path, value in old.items():
        assert torch.equal(new[path], value) if isinstance(value, Tensor) else new[path] == value, path


def test_training_goes_on(resumed: tuple[dict[str, Any], Net, FishLeg]) -> None:
    """Not in the same bits: the moments of norms are made of other gradients since."""
    written, net, optimizer = resumed
    train(net, optimizer, written["batches"][5:])
    for name, want in written["model_after_five_more_steps"].items():
        moved = want - written["model"][name]
        assert relative(net.state_dict()[name] - written["model"][name], moved) <= 0.3, name
    assert optimizer.diagnostics()["skipped_steps"] == 0
