"""Linear layers whose weight is (in, out), as GPT-2's in transformers: the same training as a linear layer's."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fishleg_fast import CategoricalLikelihood, FishLeg, Kron
from fishleg_fast.algebra.structures.diagonal import Diagonal
from fishleg_fast.model.layers import TransposedLinear, layer_of
from support.dense import relative


class Conv1D(nn.Module):
    """With transformers' names and mathematics."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


Conv1D.__module__ = "transformers.pytorch_utils"
SIZES = (3, 5, 4)  # of the input, hidden units and classes


def pair(bias: bool) -> tuple[nn.Sequential, nn.Sequential]:
    """The net with transposed weights, and with linear layers of the same."""
    torch.manual_seed(2)
    mine: list[nn.Module] = []
    theirs: list[nn.Module] = []
    for before, after in pairwise(SIZES):
        layer, linear = Conv1D(after, before).double(), nn.Linear(before, after, bias=bias).double()
        layer.bias.requires_grad_(bias)
        with torch.no_grad():
            linear.weight.copy_(layer.weight.T)
            if bias:
                linear.bias.zero_()
        mine += [layer, nn.Tanh()]
        theirs += [linear, nn.Tanh()]
    return nn.Sequential(*mine[:-1]), nn.Sequential(*theirs[:-1])


def train(net: nn.Module, masked: bool = False, **options: object) -> FishLeg:
    likelihood = CategoricalLikelihood(-1)
    optimizer = FishLeg(net, likelihood=likelihood, lr=0.05, normalize="rms", curvature_batch=None, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(7):
        x = torch.randn(6, 2, SIZES[0], generator=generator, dtype=torch.float64)
        y = torch.randint(SIZES[-1], (6, 2), generator=generator)
        if masked:
            y[2:4] = -100
        optimizer.zero_grad()
        likelihood.nll(y, net(x)).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"structure": "diagonal"},
        {"max_factor_size": 2},
        {"anchor_from": "training"},
        {"backend": "reference"},
    ],
    ids=["kron", "diagonal", "small factors", "training", "reference"],
)
def test_without_biases_it_is_a_linear_layer_s_training(options: dict, masked: bool) -> None:
    mine, theirs = pair(bias=False)
    common = {"update_aux_every": 0, "anchor_every": 3} | options
    optimizer = train(mine, masked, **common)
    train(theirs, masked, **common)
    for a, b in zip([m.weight for m in mine[::2]], [m.weight for m in theirs[::2]], strict=True):
        assert relative(a.T, b) < 1e-11
    assert all(block.layer_agrees or options.get("anchor_from") for block in optimizer.blocks)


def test_blocks_and_their_moments() -> None:
    """Of a weight those of inputs and output gradients; of a bias each entry's."""
    net, _ = pair(bias=True)
    x, e = torch.randn(4, 2, 3, dtype=torch.float64), torch.randn(4, 2, 5, dtype=torch.float64)
    optimizer = FishLeg(net, likelihood=CategoricalLikelihood(-1))
    weight, bias = optimizer.blocks[:2]
    assert (weight.name, weight.shape, type(weight.structure)) == ("0", (3, 5), Kron)
    assert (bias.name, bias.shape, type(bias.structure)) == ("0.bias", (5, 1), Diagonal)
    layer = layer_of(net[0])
    assert isinstance(layer, TransposedLinear)
    found = layer.statistics(weight, *layer.rows(weight, x, e), 8.0)  # type: ignore[misc]
    flat, gradients = x.flatten(0, 1), e.flatten(0, 1)
    assert relative(found["rows"], flat.T @ flat / 8) < 1e-12
    assert relative(found["columns"], 8 * gradients.T @ gradients) < 1e-12
    of_bias = bias.structure.layer_moments(*layer.statistics(bias, *layer.rows(bias, x, e), 8.0))  # type: ignore[misc]
    assert relative(of_bias["diagonal"], 8 * gradients.square().sum(0)[:, None]) < 1e-12


@pytest.mark.parametrize("structure", ["kron", "diagkron", "sumkron"])
def test_it_learns_with_every_structure(structure: str) -> None:
    net, _ = pair(bias=True)
    report = train(net, structure=structure, update_aux_every=2, anchor_every=3).diagnostics()
    assert report["aux_steps"] == 4 and report["anchors"] == 3
    assert report["skipped_steps"] == report["skipped_aux_steps"] == 0
