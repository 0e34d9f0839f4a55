"""λ learned by natural-gradient steps alone: FishLeg pure."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fishleg_fast import CategoricalLikelihood, DiagKron, FishLeg, GaussianLikelihood
from support.dense import dense_q, randn, relative

LIKELIHOOD = CategoricalLikelihood()
PURE: dict[str, Any] = {"anchor_every": 0, "init": "sgd"}


def net_of(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).to(dtype)


def train(net: nn.Module, optimizer: FishLeg, steps: range, scale: float = 1.0) -> list[float]:
    losses = []
    for step in steps:
        x = randn(30, 5, seed=step).to(next(net.parameters()).dtype)
        optimizer.zero_grad()
        loss = LIKELIHOOD.nll(x[:, :3].argmax(1), net(x))
        (scale * loss).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_pure_learns_by_natural_gradients_and_the_published_way_is_by_adam() -> None:
    optimizer = FishLeg(net_of(), likelihood=LIKELIHOOD, **PURE)
    s = optimizer.settings
    assert (s.aux_update, s.aux_lr, s.update_aux_every, s.damping_scale) == ("natural", 0.1, 10, "relative")
    train(optimizer.model, optimizer, range(21))
    report = optimizer.diagnostics()
    assert report["aux_steps"] == 3 and report["anchors"] == 0
    assert all(not b.exp_avg for b in optimizer.blocks)
    s = FishLeg(net_of(), likelihood=LIKELIHOOD, **PURE, aux_update="adam").settings
    assert (s.aux_lr, s.update_aux_every, s.damping_scale) == (5e-4, 10, "absolute")
    assert FishLeg(net_of(), likelihood=LIKELIHOOD, **PURE, structure="diagkron").settings.aux_update == "adam"


@pytest.mark.parametrize("init", ["sgd", "kfac"])
def test_inverse_factors_are_moving_averages_of_those_of_batches(init: str) -> None:
    """Absolute damping, one linear layer: (RᵀR)⁻¹ and (LLᵀ)⁻¹ by a recursion in dense float64 matrices."""
    net = nn.Linear(4, 3, bias=False).double()
    likelihood, gamma = GaussianLikelihood(), 0.2
    optimizer = FishLeg(
        net, likelihood=likelihood, anchor_every=0, init=init, update_aux_every=2, aux_lr=0.25, lr=1e-3,
        damping=gamma, damping_scale="absolute", backend="reference",
    )  # fmt: skip
    (block,) = optimizer.blocks
    P, S = torch.eye(3).double(), torch.eye(4).double()
    for step in range(8):
        optimizer.zero_grad()
        likelihood.nll(randn(20, 3, seed=50 + step), net(randn(20, 4, seed=step))).backward()
        optimizer.step()
        if step % 2 == 0:
            k = step // 2 + 1
            rate = 0.25 / (1 - 0.75**k)
            G, A = (t / block.moments_weight for t in block.moments.values())
            target = (G * (A @ S).trace() + gamma * torch.eye(3).double() * S.trace()) / 4
            P = torch.linalg.inv((1 - rate) * torch.linalg.inv(P) + rate * target)
            target = (A * (G @ P).trace() + gamma * torch.eye(4).double() * P.trace()) / 3
            S = torch.linalg.inv((1 - rate) * torch.linalg.inv(S) + rate * target)
        Q = dense_q(block.structure, block.structure.fishleg_aux)
        assert relative(Q, torch.kron(P, S)) < 1e-9, step


@pytest.mark.parametrize("anchor_from", ["drawn", "training"])
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_scale_of_the_loss_does_not_matter(scale: float, anchor_from: str) -> None:
    def run(sigma: float) -> Tensor:
        net = net_of()
        likelihood = GaussianLikelihood(sigma=sigma)
        optimizer = FishLeg(net, likelihood=likelihood, **PURE, update_aux_every=2, anchor_from=anchor_from)
        for step in range(9):
            optimizer.zero_grad()
            likelihood.nll(randn(30, 3, seed=step), net(randn(30, 5, seed=step))).backward()
            optimizer.step()
        return torch.cat([p.detach().reshape(-1) for p in net.parameters()])

    assert relative(run(scale**0.5), run(1.0)) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_trains_from_the_identity(dtype: torch.dtype) -> None:
    net = net_of(dtype=dtype)
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, lr=0.02, **PURE)
    losses = train(net, optimizer, range(200))
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    assert optimizer.diagnostics()["skipped_steps"] == 0


def test_it_resumes_bit_for_bit() -> None:
    def make() -> tuple[nn.Module, FishLeg]:
        net = net_of(dtype=torch.float32)
        return net, FishLeg(net, likelihood=LIKELIHOOD, **PURE, update_aux_every=3)

    net, optimizer = make()
    train(net, optimizer, range(7))
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    train(net, optimizer, range(7, 16))
    other, resumed = make()
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other.load_state_dict(weights), resumed.load_state_dict(state)
    train(other, resumed, range(7, 16))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))
    assert optimizer.diagnostics() == resumed.diagnostics()


def test_a_batch_that_is_not_finite_leaves_lambda_as_it_is() -> None:
    net = net_of()
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, **PURE, update_aux_every=1)
    train(net, optimizer, range(3))
    before = [t.clone() for b in optimizer.blocks for t in b.structure.fishleg_aux.values()]
    optimizer.zero_grad()
    LIKELIHOOD.nll(torch.arange(30) % 3, net(randn(30, 5))).backward()
    with torch.no_grad():
        net(torch.full((30, 5), torch.nan).double())
    net[0].weight.grad[0, 0] = torch.nan
    with pytest.warns(UserWarning, match="skipped a step"):
        optimizer.step()
    now = [t for b in optimizer.blocks for t in b.structure.fishleg_aux.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "anchored": ({"anchor_every": 10}, "anchor_every should be 0 with aux_update='natural'"),
    "a rate over one": ({"aux_lr": 1.5}, "aux_lr should be at most 1"),
    "several a step": ({"update_aux_every": -2}, "update_aux_every should be at least 1"),
    "structure": ({"structure": "sumkron"}, "structure should be 'kron' or 'diagonal'"),
    "own structure": ({"structure": DiagKron}, "structure should be 'kron' or 'diagonal'"),
    "no such update": ({"aux_update": "sgd"}, "aux_update should be one of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_go_with_it_is_refused(name: str) -> None:
    settings, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        FishLeg(net_of(), likelihood=LIKELIHOOD, **{**PURE, "aux_update": "natural", **settings})


def test_it_needs_no_pretraining() -> None:
    with pytest.raises(ValueError, match="aux_update='adam'"):
        FishLeg(net_of(), likelihood=LIKELIHOOD, **PURE).pretrain_aux(3)


def test_an_update_that_a_checkpoint_owes_is_none_of_adam_s() -> None:
    for settings in (PURE, {}):
        net = net_of()
        optimizer = FishLeg(net, likelihood=LIKELIHOOD, **settings)
        train(net, optimizer, range(2))
        state = optimizer.state_dict()
        state["param_groups"][0]["fishleg"]["owed_updates"] = 1
        optimizer.load_state_dict(state)
        before = [t.clone() for b in optimizer.blocks for t in b.structure.fishleg_aux.values()]
        train(net, optimizer, range(2, 3))
        now = [t for b in optimizer.blocks for t in b.structure.fishleg_aux.values()]
        assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


def test_units_are_one_again_where_damping_is_absolute() -> None:
    """After a checkpoint of relative damping."""
    for settings in (PURE, {"anchor_every": 2}):
        net = net_of()
        optimizer = FishLeg(net, likelihood=LIKELIHOOD, **settings)
        train(net, optimizer, range(3))
        assert all(float(b.unit) != 1 for b in optimizer.blocks)
        other = FishLeg(net, likelihood=LIKELIHOOD, **settings, damping_scale="absolute", damping=0.1)
        other.load_state_dict(optimizer.state_dict())
        train(net, other, range(3, 24))
        assert all(float(b.unit) == 1 for b in other.blocks)


def test_a_layer_without_finite_moments_leaves_the_others_units_alone() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.spoil = nn.Linear(5, 6), nn.Linear(6, 3), False

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            if self.spoil and h.requires_grad:
                h.register_hook(lambda g: g * torch.nan)
            return self.b(torch.tanh(h))

    def unit(spoil: bool) -> float:
        net = Net().double()
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(randn(*p.shape))
        optimizer = FishLeg(net, likelihood=LIKELIHOOD, **PURE, update_aux_every=1, lr=1e-9)
        train(net, optimizer, range(3))
        optimizer.model.spoil = spoil
        for step in range(3, 13):
            optimizer.zero_grad()
            x = randn(30, 5, seed=step)
            LIKELIHOOD.nll(x[:, :3].argmax(1), net(x)).backward()
            for p in net.a.parameters():
                p.grad.nan_to_num_()
            optimizer.step()
        return float(optimizer.blocks[1].unit)

    assert unit(True) == pytest.approx(unit(False), rel=0.1)
