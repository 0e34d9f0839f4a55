"""anchor_from="training": Kronecker factors from the user's own backward pass, and none of the optimizer's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fishleg_fast import CategoricalLikelihood, FishLeg, FishModule
from support.dense import dense_q, randn, relative

LIKELIHOOD = CategoricalLikelihood()
DELTA = 1.2


class Scaled(FishModule):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.fishleg_aux = {"d": torch.ones(n, dtype=torch.float64)}

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x

    def Qv(self, v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.fishleg_aux["d"].square() * v[0],)


class Net(nn.Module):
    """What shows its inputs, a layer called twice, one that hides, a user's own and a bare parameter; counts passes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first = nn.Conv1d(2, 3, 3), nn.Linear(18, 10)
        self.twice, self.norm = nn.Linear(10, 10), nn.LayerNorm(10)
        self.attention = nn.MultiheadAttention(10, 2, batch_first=True)
        self.scaled, self.out = Scaled(10), nn.Linear(10, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        h = torch.tanh(self.first(torch.tanh(self.conv(x)).flatten(1)))
        h = self.norm(torch.tanh(self.twice(torch.tanh(self.twice(h)))))
        h = h + self.attention(h[:, None], h[:, None], h[:, None], need_weights=False)[0][:, 0]
        return self.out(self.scaled(h)) * self.scale


def data(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return randn(16, 2, 8, seed=step).to(dtype), torch.arange(16) % 3


def fishleg(net: nn.Module, **settings: object) -> FishLeg:
    settings = {"damping": DELTA, "damping_scale": "relative", "anchor_from": "training", **settings}
    return FishLeg(net, likelihood=LIKELIHOOD, **settings)


def train(net: nn.Module, optimizer: FishLeg, steps: range, factor: float = 1.0) -> Tensor:
    dtype = next(net.parameters()).dtype
    for step in steps:
        x, y = data(step, dtype)
        optimizer.zero_grad()
        (factor * LIKELIHOOD.nll(y, net(x))).backward()
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def shown(net: Net, x: Tensor, y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and output gradients of the linear layers, a call after another, by hooks of the test's own."""
    seen: dict[str, list[list[Tensor]]] = {}
    handles = []
    for name in ("first", "out"):

        def hook(module: nn.Module, args: tuple, output: Tensor, name: str = name) -> None:
            output.retain_grad()
            seen.setdefault(name, []).append([args[0].detach(), output])

        handles.append(getattr(net, name).register_forward_hook(hook))
    LIKELIHOOD.nll(y, net(x)).backward()
    for handle in handles:
        handle.remove()
    net.zero_grad()
    return {name: (calls[0][0], calls[0][1].grad) for name, calls in seen.items()}


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_q_is_that_of_the_users_pass(dtype: torch.dtype, backend: str) -> None:
    net = Net().to(dtype)
    x, y = data(0, dtype)
    want = shown(copy.deepcopy(net), x, y)
    optimizer = fishleg(net, backend=backend, update_aux_every=0)
    train(net, optimizer, range(1))
    blocks = {b.name: b for b in optimizer.blocks}
    for name, (a, e) in want.items():
        a = torch.cat([a, torch.ones(len(a), 1, dtype=dtype)], dim=1).double()
        factors = [e.double().T @ e.double(), a.T @ a]
        factors[1] = factors[1] / len(a)
        factors = [F * 0.1 / blocks[name].moments_weight.item() for F in factors]  # 0.1 in float32
        means, unit = [F.trace() / len(F) for F in factors], blocks[name].unit.double()
        gamma = DELTA**2 * unit / len(x)  # as many terms as the layer next to the loss has rows
        shifts = [(gamma * means[0] / means[1]).sqrt(), (gamma * means[1] / means[0]).sqrt()]
        damped = [F + c * torch.eye(len(F), dtype=torch.float64) for F, c in zip(factors, shifts, strict=True)]
        structure = blocks[name].structure
        got = dense_q(structure, structure.fishleg_aux).double() / unit
        assert relative(got, torch.kron(*map(torch.linalg.inv, damped))) <= (1e-9 if dtype == torch.float64 else 1e-4)
    assert all(b.moments_weight > 0 for b in optimizer.blocks if b.moments)  # those that hide have their gradient's


def test_there_are_no_passes_but_the_users() -> None:
    net = Net().double()
    optimizer = fishleg(net, update_aux_every=0, anchor_every=2)
    train(net, optimizer, range(7))
    assert net.passes == 7 and optimizer.diagnostics()["anchors"] == 4
    tap = optimizer._statistics
    assert not tap._moments and not tap.open  # the seventh step was the last that was due: the eighth is not


@pytest.mark.parametrize("normalize", ["rms", "spectral"])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_the_scale_of_the_loss_does_not_matter(backend: str, normalize: str) -> None:
    """λ is learned on the way, from F v of the loss as it is and factors of the loss as it was scaled."""
    found = []
    for factor in (1.0, 2.0**16, 2.0**-12):
        torch.manual_seed(0)
        net = Net().double()
        settings = {"backend": backend, "normalize": normalize, "update_aux_every": 2, "anchor_every": 5}
        found.append(train(net, fishleg(net, **settings), range(12), factor))
    assert max(relative(x, found[0]) for x in found[1:]) <= 1e-8


def test_accumulated_gradients_are_of_all_passes() -> None:
    net = nn.Sequential(nn.Linear(4, 3)).double()
    optimizer = fishleg(net, update_aux_every=0, backend="reference", lr=0.0)
    x, y = randn(10, 4), torch.arange(10) % 3
    for part in (slice(0, 5), slice(5, 10)):
        (0.5 * LIKELIHOOD.nll(y[part], net(x[part]))).backward()
    optimizer.step()
    whole = fishleg(net, update_aux_every=0, backend="reference", lr=0.0)
    net.zero_grad()
    LIKELIHOOD.nll(y, net(x)).backward()
    whole.step()
    aux = [o.blocks[0].structure.fishleg_aux for o in (optimizer, whole)]
    assert all(relative(aux[0][name], aux[1][name]) <= 1e-12 for name in aux[0])


def test_resuming_is_bit_for_bit() -> None:
    def fresh() -> tuple[Net, FishLeg]:
        torch.manual_seed(0)
        net = Net()
        return net, fishleg(net, anchor_every=3, update_aux_every=2)

    net, optimizer = fresh()
    train(net, optimizer, range(6))  # the next step is due
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net.state_dict())
    want = train(net, optimizer, range(6, 10))
    other, resumed = fresh()
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    assert torch.equal(train(other, resumed, range(6, 10)), want)


def test_checkpointed_layers_and_unused_branches() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out, self.unused = nn.Linear(16, 9), nn.Linear(9, 3), nn.Linear(9, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(checkpoint(lambda t: torch.tanh(self.body(t)), x.flatten(1), use_reentrant=False))

    net = Checkpointed().double()
    optimizer = fishleg(net, anchor_every=2)
    train(net, optimizer, range(5))
    weights = {b.name: float(b.moments_weight) for b in optimizer.blocks}
    assert weights["body"] > 0 and weights["out"] > 0 and weights["unused"] == 0
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_pretraining_comes_before_any_backward_pass() -> None:
    net = Net().double()
    optimizer = fishleg(net)
    net(data(0)[0])
    assert len(optimizer.pretrain_aux(2)) == 2 and optimizer.diagnostics()["anchors"] == 1


def test_it_goes_with_relative_damping() -> None:
    with pytest.raises(ValueError, match="anchor_from='training' goes with damping_scale='relative'"):
        FishLeg(nn.Linear(2, 2), likelihood=LIKELIHOOD, anchor_from="training", damping_scale="absolute")
    with pytest.raises(ValueError, match="anchor_from should be one of"):
        fishleg(nn.Linear(2, 2), anchor_from="labels")


def test_hooks_go_with_the_optimizer() -> None:
    net = Net()
    optimizer = fishleg(net, thin_gradients=False)
    hooks = lambda: sum(len(m._forward_hooks) for m in net.modules())
    assert hooks() > 0
    del optimizer
    assert hooks() == 0
