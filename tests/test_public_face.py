"""The calls that users write: the talk's, the short one, a custom module, structures by name."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import Tensor, nn

import fishleg_fast
from fishleg_fast import CategoricalLikelihood, FishLeg, FishLinear, FishModule, GaussianLikelihood, Kron, SumKron
from fishleg_fast.model.assemble import STRUCTURES


def blobs(count: int = 256, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three Gaussian blobs in eight dimensions: inputs (count, 8), labels (count,)."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(3, 8, generator=generator)
    y = torch.randint(3, (count,), generator=generator)
    return centres[y] + torch.randn(count, 8, generator=generator), y


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return (net(x).argmax(1) == y).float().mean().item()


@pytest.mark.parametrize("workers", [0, 1])
def test_the_talks_code_runs_as_written(workers: int) -> None:
    x, y = blobs()
    trainset = torch.utils.data.TensorDataset(x, y)
    trainloader = torch.utils.data.DataLoader(trainset, batch_size=64, shuffle=True)
    net = mlp()

    likelihood = CategoricalLikelihood()

    def nll(model, data_x, data_y):
        pred_y = model.forward(data_x)
        return likelihood.nll(data_y, pred_y)

    def draw(model, data_x):
        pred_y = model.forward(data_x)
        return likelihood.draw(pred_y)

    auxloader = torch.utils.data.DataLoader(trainset, batch_size=128, shuffle=True, num_workers=workers)

    optimizer = FishLeg(net, draw, nll, likelihood, auxloader)
    assert optimizer.model is net
    for _ in range(10):
        for _batch_idx, (inputs, targets) in enumerate(trainloader):
            optimizer.zero_grad()
            outputs = optimizer.model.forward(inputs)
            loss = likelihood.nll(targets, outputs)
            loss.backward()
            optimizer.step()
    assert accuracy(net, x, y) > 0.9
    assert optimizer.diagnostics()["anchors"] > 0


@pytest.mark.parametrize("call", ["forward", "__call__"])
def test_the_short_call_takes_curvature_batches_from_the_models_inputs(call: str) -> None:
    x, y = blobs()
    net, likelihood = mlp(), CategoricalLikelihood()
    optimizer = FishLeg(net, likelihood=likelihood)
    for _ in range(40):
        optimizer.zero_grad()
        likelihood.nll(y, getattr(optimizer.model, call)(x)).backward()
        optimizer.step()
    assert accuracy(net, x, y) > 0.9


@pytest.mark.parametrize("fisher", ["ggn", "hessian", "antithetic", "rank1"])
def test_every_estimator_trains(fisher: str) -> None:
    x, y = blobs()
    net, likelihood = mlp(), CategoricalLikelihood()
    optimizer = FishLeg(net, likelihood=likelihood, fisher=fisher, update_aux_every=2)
    for _ in range(40):
        optimizer.zero_grad()
        likelihood.nll(y, net(x)).backward()
        optimizer.step()
    assert accuracy(net, x, y) > 0.9
    assert optimizer.diagnostics()["skipped_aux_steps"] == 0


def test_draw_and_nll_alone_are_enough() -> None:
    x, y = blobs()
    net = mlp()

    def nll(model: nn.Module, data_x: Tensor, data_y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(data_x), data_y)

    def draw(model: nn.Module, data_x: Tensor) -> Tensor:
        return torch.distributions.Categorical(logits=model(data_x)).sample()

    optimizer = FishLeg(net, draw, nll)
    assert optimizer.settings.fisher == "hessian"
    for _ in range(40):
        optimizer.zero_grad()
        nll(net, x, y).backward()
        optimizer.step()
    assert accuracy(net, x, y) > 0.9


class TalkLinear(nn.Linear, FishModule):
    """The talk's example implementation, with nothing but Qv and fishleg_aux."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.fishleg_aux = nn.ParameterDict(
            {"L": nn.Parameter(torch.eye(in_features + 1)), "R": nn.Parameter(torch.eye(out_features))}
        )

    def Qv(self, v: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        L = self.fishleg_aux["L"]
        R = self.fishleg_aux["R"]
        u = torch.cat([v[0], v[1][:, None]], dim=-1)
        z = torch.linalg.multi_dot((R.T, R, u, L, L.T))
        return (z[:, :-1], z[:, -1])


def test_a_custom_module_trains_by_autograd_through_its_qv() -> None:
    x, y = blobs()
    torch.manual_seed(0)
    net = nn.Sequential(TalkLinear(8, 16), nn.ReLU(), TalkLinear(16, 3))
    assert not [name for name in [*net.state_dict(), *dict(net.named_parameters())] if "aux" in name]
    likelihood = CategoricalLikelihood()
    optimizer = FishLeg(net, likelihood=likelihood, aux_lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        likelihood.nll(y, net(x)).backward()
        optimizer.step()
    assert accuracy(net, x, y) > 0.9
    assert not torch.equal(net[0].fishleg_aux["L"], torch.eye(9))
    assert net[0].fishleg_aux["L"].grad is None


def test_a_custom_module_steps_as_the_builtin_structure_does() -> None:
    x, y = blobs()
    likelihood = CategoricalLikelihood()
    nets = [nn.Sequential(TalkLinear(8, 16), nn.ReLU(), TalkLinear(16, 3)).double(), mlp().double()]
    nets[0].load_state_dict(nets[1].state_dict())
    for net in nets:
        for module in net.modules():
            if isinstance(module, TalkLinear):
                module.fishleg_aux = {k: t.detach().double() for k, t in module.fishleg_aux.items()}
        # without bias correction of λ's tiny gradients by eps, Adam would magnify rounding
        settings = {"init": "sgd", "anchor_every": 0, "aux_update": "adam", "update_aux_every": 1, "aux_eps": 1e-3}
        optimizer = FishLeg(net, likelihood=likelihood, **settings)
        for _ in range(5):
            optimizer.zero_grad()
            likelihood.nll(y, net(x.double())).backward()
            optimizer.step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_lambda_is_the_optimizers_and_reachable_from_the_layer() -> None:
    net = mlp()
    before = list(net.state_dict()), [n for n, _ in net.named_parameters()], type(net)
    optimizer = FishLeg(net, likelihood=CategoricalLikelihood())
    assert net[0].fishleg_aux["L"].shape == (9, 9) and net[0].fishleg_aux["R"].shape == (16, 16)
    assert (list(net.state_dict()), [n for n, _ in net.named_parameters()], type(net)) == before
    state = optimizer.state_dict()["state"][0]
    assert state["fishleg_aux"]["L"] is net[0].fishleg_aux["L"]


def test_fish_layers_and_plain_layers_train_alike() -> None:
    x, y = blobs()
    likelihood = CategoricalLikelihood()
    plain = mlp()
    fish = nn.Sequential(FishLinear(8, 16), nn.ReLU(), FishLinear(16, 3))
    fish.load_state_dict(plain.state_dict())
    for net in (plain, fish):
        optimizer = FishLeg(net, likelihood=likelihood)
        for _ in range(5):
            optimizer.zero_grad()
            likelihood.nll(y, net(x)).backward()
            optimizer.step()
    for p, q in zip(plain.parameters(), fish.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_fish_layers_qv_is_its_blocks() -> None:
    layer = FishLinear(4, 3)
    v = (torch.randn(3, 4), torch.randn(3))
    for got, want in zip(layer.Qv(v), v, strict=True):
        assert torch.equal(got, want)  # no optimizer yet: the identity
    FishLeg(layer, likelihood=GaussianLikelihood(), init="sgd", scale=0.25)
    for got, want in zip(layer.Qv(v), v, strict=True):
        torch.testing.assert_close(got, want / 4)
    with pytest.raises(ValueError, match="v should hold one tensor"):
        layer.Qv((v[0],))


def test_structures_by_name_pattern_and_by_module() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), FishLinear(16, 3, structure="diagonal"), nn.Linear(3, 3))
    choice = {"0": functools.partial(Kron, scale=True), "[12]": functools.partial(SumKron, terms=3)}
    FishLeg(net, likelihood=CategoricalLikelihood(), structure=choice)
    assert [sorted(layer.fishleg_aux) for layer in net] == [
        ["A", "L", "R"],
        ["L1", "L2", "L3", "R1", "R2", "R3"],
        ["d"],
        ["L", "R"],
    ]


@pytest.mark.parametrize("structure", [*STRUCTURES, functools.partial(Kron, scale=True)])
@pytest.mark.parametrize("init", ["kfac", "sgd"])
def test_every_structure_trains_from_both_starts(structure, init: str) -> None:
    x, y = blobs()
    net, likelihood = mlp(), CategoricalLikelihood()
    optimizer = FishLeg(net, likelihood=likelihood, structure=structure, init=init, max_factor_size=7)
    for _ in range(50):
        optimizer.zero_grad()
        likelihood.nll(y, net(x)).backward()
        optimizer.step()
    assert accuracy(net, x, y) > 0.9


def test_public_names_are_importable() -> None:
    for name in ("FishModule", "FishConv2d", "FishEmbedding", "FishLayerNorm", "FishBatchNorm3d", "FishRMSNorm"):
        assert hasattr(fishleg_fast, name)


@pytest.mark.parametrize("anchor_from", ["drawn", "training"])
def test_normalisation_by_layer(anchor_from: str) -> None:
    """Patterns choose, as they do of structures; the rest is "rms"."""
    x, y = blobs()
    net, likelihood = mlp(), CategoricalLikelihood()
    options = {"damping": 0.3, "damping_scale": "relative", "anchor_from": anchor_from}
    optimizer = FishLeg(net, likelihood=likelihood, normalize={"0": "spectral", "*": "rms"}, **options)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = likelihood.nll(y, net(x))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert [b.flattened for b in optimizer.blocks] == [True, *[False] * (len(optimizer.blocks) - 1)]
    with pytest.raises(ValueError, match=r"normalize should map patterns to one of .*but has: 'trust'"):
        FishLeg(net, likelihood=likelihood, normalize={"*": "trust"})


@pytest.mark.parametrize("argument,choice", [("structure", "diagonal"), ("normalize", "spectral")])
def test_patterns_that_match_nothing_are_told(argument: str, choice: str) -> None:
    told = f"{argument} has a pattern that no trained layer's name matches: 'fc\\*'.*'0'"
    with pytest.warns(UserWarning, match=told):
        FishLeg(mlp(), likelihood=CategoricalLikelihood(), **{argument: {"fc*": choice}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FishLeg(mlp(), likelihood=CategoricalLikelihood(), **{argument: {"0": choice, "*": choice}})
    with pytest.raises(TypeError, match=f"{argument} should have name patterns, strings, for its keys but has: 0"):
        FishLeg(mlp(), likelihood=CategoricalLikelihood(), **{argument: {0: choice}})
