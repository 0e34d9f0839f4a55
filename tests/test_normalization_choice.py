"""normalize="auto": "spectral" where most of a model's weights serve several positions of a sample, else "rms"."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fishleg_fast import CategoricalLikelihood, FishLeg
from support.dense import randn

LIKELIHOOD = CategoricalLikelihood()


class Flat(nn.Module):
    """Positions in one dimension with the samples: nobody can tell them."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.wide(x.flatten(0, -2)))).unflatten(0, x.shape[:-1]).flatten(1, -2).mean(1)


class Tokens(nn.Module):
    """A layer for all positions, and a head for their mean; the head is the larger one where it is ``wide``."""

    def __init__(self, wide: int = 3) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
        self.mix, self.up, self.head = nn.Linear(4, 4), nn.Linear(4, wide), nn.Linear(wide, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.norm(self.mix(self.embedding(x))).mean(1)))


class Tied(nn.Module):
    """An autoencoder's tied weights: at how many positions they are used is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.down.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.up(x))))


def images() -> Tensor:
    return randn(6, 2, 5, 5).float()


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


MODELS = {
    "mlp": (mlp, lambda: randn(6, 4).float(), "rms"),
    "mlp on one sample": (mlp, lambda: randn(1, 4).float(), "rms"),
    "larger head": (convolutions, images, "rms"),  # 165 entries in the head, 114 in the convolution
    "convolution": (lambda: nn.Sequential(nn.Conv2d(2, 3, 5), nn.Flatten(), nn.ReLU()), images, "spectral"),
    "tokens": (Tokens, lambda: torch.arange(12).reshape(6, 2) % 5, "spectral"),
    "tokens with a wide head": (lambda: Tokens(40), lambda: torch.arange(12).reshape(6, 2) % 5, "rms"),
    "flattened positions": (Flat, lambda: randn(6, 2, 4).float(), "rms"),
    "tied": (Tied, lambda: randn(6, 4).float(), "rms"),
}


def step(net: nn.Module, optimizer: FishLeg, x: Tensor) -> None:
    optimizer.zero_grad()
    LIKELIHOOD.nll(torch.arange(len(x)) % 3, net(x)).backward()
    optimizer.step()


@pytest.mark.parametrize("settings", [{}, {"thin_gradients": False}, {"anchor_from": "training"}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_model_decides(name: str, settings: dict) -> None:
    make, data, want = MODELS[name]
    net = make()
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, **settings)
    for _ in range(3):
        step(net, optimizer, data())
        assert set(optimizer.diagnostics()["normalize"].values()) == {want}
    assert optimizer.diagnostics()["skipped_steps"] == 0


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("name", ["mlp", "tokens"])
def test_it_steps_as_what_it_chose(name: str, backend: str) -> None:
    make, data, want = MODELS[name]
    start, moved = make(), []
    for normalize in ("auto", want):
        net = copy.deepcopy(start)
        optimizer = FishLeg(net, likelihood=LIKELIHOOD, normalize=normalize, backend=backend)
        for _ in range(4):
            step(net, optimizer, data())
        moved.append(torch.cat([p.detach().reshape(-1) for p in net.parameters()]))
    assert torch.equal(*moved)


def test_the_choice_is_made_again_after_a_resume() -> None:
    make, data, want = MODELS["tokens"]
    net = make()
    optimizer = FishLeg(net, likelihood=LIKELIHOOD)
    for _ in range(3):
        step(net, optimizer, data())
    other = copy.deepcopy(net)
    resumed = FishLeg(other, likelihood=LIKELIHOOD)
    resumed.load_state_dict(optimizer.state_dict())
    for _ in range(12):
        step(net, optimizer, data())
        step(other, resumed, data())
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))
    assert set(resumed.diagnostics()["normalize"].values()) == {want}


def test_hooks_go_when_they_have_seen_enough() -> None:
    net = mlp()
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, thin_gradients=False)
    assert len(net[0]._forward_hooks) == 1
    step(net, optimizer, randn(6, 4).float())
    assert not net[0]._forward_hooks and not net[2]._forward_hooks


def test_a_groups_own_choice_comes_first_then_patterns() -> None:
    net = mlp()
    groups = [{"params": net[0].parameters(), "normalize": "spectral"}, {"params": net[2].parameters()}]
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, params=groups, normalize={"0": "rms"})
    step(net, optimizer, randn(6, 4).float())
    assert optimizer.diagnostics()["normalize"] == {"0": "spectral", "2": "rms"}
    assert [b.flattened for b in optimizer.blocks] == [True, False]
    optimizer.param_groups[0]["normalize"] = "rms"  # from the next step on
    step(net, optimizer, randn(6, 4).float())
    assert [b.flattened for b in optimizer.blocks] == [False, False]
    with pytest.raises(ValueError, match=r"normalize of a group should be one of .* but is: 'trust'"):
        FishLeg(net, likelihood=LIKELIHOOD, params=[{"params": net.parameters(), "normalize": "trust"}])
    with pytest.raises(ValueError, match=r"normalize of a group goes with .* but that is: None"):
        FishLeg(net, likelihood=LIKELIHOOD, params=[{"params": net.parameters(), "normalize": "rms"}], normalize=None)


def test_damping_is_absolute_where_q_keeps_its_scale_or_nothing_is_estimated() -> None:
    cases = [({}, "relative", 10.0), ({"normalize": None}, "absolute", 0.1), ({"normalize": "trust"}, "absolute", 0.1)]
    pure = {"init": "sgd", "anchor_every": 0}
    cases += [(pure, "relative", 10.0), ({**pure, "aux_update": "adam"}, "absolute", 0.1)]
    cases += [({**pure, "update_aux_every": 0}, "absolute", 0.1), ({"init": "sgd"}, "relative", 10.0)]
    cases += [({"damping_scale": "absolute"}, "absolute", 0.1), ({"damping": 3.0}, "relative", 3.0)]
    for given, scale, damping in cases:
        settings = FishLeg(mlp(), likelihood=LIKELIHOOD, **given).settings
        assert (settings.damping_scale, settings.damping) == (scale, damping), given


@pytest.mark.parametrize(("size", "want"), [(1, 1), (3, 3), (8, 4), (100, 25), (1000, 32)])
def test_curvature_batches_are_a_quarter_of_the_batch_within_4_and_32(size: int, want: int) -> None:
    net = mlp()
    optimizer = FishLeg(net, likelihood=LIKELIHOOD)
    net(randn(size, 4).float())
    assert optimizer._passes.inputs("auto").size() == want
    loaded = FishLeg(mlp(), likelihood=LIKELIHOOD, aux_loader=[randn(size, 4).float()])
    assert loaded._passes.inputs("auto").size() == min(size, 32)  # whoever gives batches has chosen their size
