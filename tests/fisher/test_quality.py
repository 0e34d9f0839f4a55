"""How well Q inverts the damped Fisher matrix along u: ``diagnostics(quality=True)`` against dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fishleg_fast import CategoricalLikelihood, FishLeg
from support.dense import dense_q, explicit_fisher, randn, relative

LIKELIHOOD = CategoricalLikelihood()
SETTINGS: dict[str, dict[str, Any]] = {
    "anchored": {},
    "absolute": {"damping_scale": "absolute", "normalize": "rms", "damping": 0.3},
    "pure": {"anchor_every": 0, "init": "sgd"},
    "learned": {"update_aux_every": 1},
    "cpp": {"backend": "cpp"},
    "shared likelihood": {"u_sampling": "momentum"},
}


def trained(steps: int = 3, **settings: Any) -> tuple[nn.Sequential, FishLeg, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)).double()
    x = randn(20, 5)
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, curvature_batch=None, lr=1e-2, **settings)
    for _ in range(steps):
        optimizer.zero_grad()
        LIKELIHOOD.nll(torch.arange(20) % 3, net(x)).backward()
        optimizer.step()
    return net, optimizer, x


@pytest.mark.parametrize("name", SETTINGS)
def test_it_is_that_of_dense_matrices(name: str) -> None:
    net, optimizer, x = trained(**SETTINGS[name])
    found, blocks = optimizer.diagnostics(quality=True)["quality"], optimizer.blocks
    units = torch.cat([b.unit.expand(b.momentum.numel()) for b in blocks])
    root = units.rsqrt()
    F = root[:, None] * explicit_fisher(net, x, "categorical") * root
    damped = F + optimizer._learner.damping * torch.eye(len(F)).double()
    g = torch.cat([p.grad.reshape(-1) for p in net.parameters()])
    if SETTINGS[name].get("u_sampling") == "momentum":
        pairs = zip(blocks, net.parameters(), strict=True)
        g = torch.cat([torch.lerp(b.momentum, p.grad, 0.1).reshape(-1) for b, p in pairs])
    u = g * root / (g * root).norm()
    v = torch.block_diag(*[dense_q(b.structure, b.structure.fishleg_aux) for b in blocks]) @ u
    residual = damped @ v - u
    assert found.aux_loss == pytest.approx(float(0.5 * v @ damped @ v - u @ v), rel=1e-9)
    multiples = torch.linspace(0, 3, 3001).double() * found.best_multiple
    losses = 0.5 * multiples**2 * (v @ damped @ v) - multiples * (u @ v)
    assert found.best_aux_loss == pytest.approx(float(losses.min()), rel=1e-6)
    assert found.best_aux_loss <= found.aux_loss < 0 or found.aux_loss >= 0
    sizes = [b.momentum.numel() for b in blocks]
    want = [float(r.norm() / part.norm()) for r, part in zip(residual.split(sizes), u.split(sizes), strict=True)]
    assert list(found.residuals) == ["0", "2"]
    assert relative(torch.tensor(list(found.residuals.values())), torch.tensor(want)) < 1e-6


def test_without_gradients_it_is_along_drawn_ones() -> None:
    _, optimizer, _ = trained()
    optimizer.zero_grad()
    found = optimizer.diagnostics(quality=True)["quality"]
    assert found.best_aux_loss < 0 and 0 < found.best_multiple < 100
    assert all(0 < r < 100 for r in found.residuals.values())


def test_blocks_without_a_gradient_are_zero_or_left_out() -> None:
    net, optimizer, _ = trained()
    net[0].weight.grad = None
    assert list(optimizer.diagnostics(quality=True)["quality"].residuals) == ["2"]
    net[0].weight.grad = torch.zeros_like(net[0].weight)
    assert optimizer.diagnostics(quality=True)["quality"].residuals["0"] == 0
    net[2].weight.grad = torch.zeros_like(net[2].weight)
    found = optimizer.diagnostics(quality=True)["quality"]
    assert (found.aux_loss, found.best_aux_loss, found.best_multiple) == (0, 0, 0)


def test_batches_that_were_looked_at_come_again() -> None:
    """Whatever random numbers the loader is of, and without its pass being replayed."""

    def run(ask: bool) -> tuple[list[Tensor], int, dict]:
        pulled = [0]

        class Counted(torch.utils.data.Dataset):
            def __len__(self) -> int:
                return 30

            def __getitem__(self, k: int) -> Tensor:
                pulled[0] += 1
                return randn(5, seed=k)

        own = torch.Generator().manual_seed(7)
        loader = torch.utils.data.DataLoader(Counted(), batch_size=10, shuffle=True, generator=own)
        net, optimizer, x = trained(steps=2, update_aux_every=1, aux_loader=loader)
        for _ in range(9):
            optimizer.zero_grad()
            LIKELIHOOD.nll(torch.arange(20) % 3, net(x)).backward()
            for _ in range(2 if ask else 0):
                optimizer.diagnostics(quality=True)
            optimizer.step()
        return [p.detach() for p in net.parameters()], pulled[0], optimizer.state_dict()["param_groups"][0]["fishleg"]

    (asked, count, state), (want, expected, unasked) = run(True), run(False)
    assert all(torch.equal(a, b) for a, b in zip(asked, want, strict=True))
    assert count == expected and state == unasked


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("loaded", [False, True])
def test_asking_changes_nothing_in_the_training(name: str, loaded: bool) -> None:
    def run(ask: bool) -> list[Tensor]:
        more = {"aux_loader": torch.utils.data.DataLoader(randn(30, 5), batch_size=7, shuffle=True)} if loaded else {}
        net, optimizer, x = trained(steps=2, **SETTINGS[name], **more)
        for _ in range(13):
            optimizer.zero_grad()
            if ask:
                optimizer.diagnostics(quality=True)
            LIKELIHOOD.nll(torch.arange(20) % 3, net(x)).backward()
            if ask:
                optimizer.diagnostics(quality=True)
            optimizer.step()
        return [p.detach() for p in net.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))
