"""Damping in units of the Fisher matrix's mean eigenvalues and of the batch's noise: no scale of the loss matters."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fishleg_fast import CategoricalLikelihood, FishLeg, GaussianLikelihood
from support.dense import dense_q, explicit_fisher, randn, relative

DELTA = 2.0


class Net(nn.Module):
    """Layers of each kind: convolution, norm, embedding-like table, linear, a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 3, 3), nn.LayerNorm(18)
        self.wide, self.out = nn.Linear(18, 20), nn.Linear(20, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.conv(x)).flatten(1))
        return self.out(torch.tanh(self.wide(h))) * self.scale


def trained(likelihood: GaussianLikelihood, backend: str = "reference", steps: int = 14, **settings: object) -> Tensor:
    torch.manual_seed(0)
    net = Net().double()
    settings = {"damping": DELTA, "damping_scale": "relative", "update_aux_every": 2, "anchor_every": 5, **settings}
    optimizer = FishLeg(net, likelihood=likelihood, backend=backend, **settings)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(32, 2, 8, generator=generator).double()
        optimizer.zero_grad()
        likelihood.nll(x[:, 0, :3] ** 2, net(x)).backward()
        optimizer.step()
    assert optimizer.diagnostics()["skipped_steps"] == optimizer.diagnostics()["skipped_aux_steps"] == 0
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


@pytest.mark.parametrize("structure", ["kron", "diagkron", "sumkron", "diagonal"])
@pytest.mark.parametrize("normalize", ["rms", "spectral"])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_training_does_not_depend_on_the_likelihoods_scale(backend: str, normalize: str, structure: str) -> None:
    """λ is learned and anchored on the way."""
    settings = {"backend": backend, "normalize": normalize, "structure": structure}
    want = trained(GaussianLikelihood(sigma=1.0), **settings)
    for sigma in (1e-3, 1e3, 3**0.5):  # the last: a mean over the three outputs, instead of their sum
        assert relative(trained(GaussianLikelihood(sigma=sigma), **settings), want) <= 1e-8
    start = trained(GaussianLikelihood(sigma=1.0), steps=0)
    absolute = [trained(GaussianLikelihood(sigma=s), damping_scale="absolute", **settings) for s in (1.0, 1e3)]
    assert relative(absolute[0] - start, absolute[1] - start) > 1e-2  # which is what it is for


@pytest.mark.parametrize("precondition_aux", [False, True])
@pytest.mark.parametrize("u_sampling", ["gradient", "momentum"])
def test_neither_do_other_ways_of_learning(u_sampling: str, precondition_aux: bool) -> None:
    settings = {"u_sampling": u_sampling, "precondition_aux": precondition_aux, "thin_gradients": False}
    want = trained(GaussianLikelihood(sigma=1.0), **settings)
    assert relative(trained(GaussianLikelihood(sigma=1e3), **settings), want) <= 1e-8


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_q_is_the_damped_inverse_of_the_scaled_factors(dtype: torch.dtype, backend: str) -> None:
    """(G + √γ/π)⁻¹ ⊗ (Ā + π√γ)⁻¹, of a diagonal block 1/(F + γ), with γ = δ²√(f F̄)/T; up to the block's unit."""
    net = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4)).to(dtype)
    likelihood = GaussianLikelihood(sigma=0.01)
    settings = {"damping": DELTA, "damping_scale": "relative", "update_aux_every": 0, "backend": backend}
    optimizer = FishLeg(net, likelihood=likelihood, lr=1e-3, **settings)
    for step in range(11):  # anchored twice: on an average
        optimizer.zero_grad()
        likelihood.nll(randn(30, 4, seed=50 + step).to(dtype), net(randn(30, 5, seed=step).to(dtype))).backward()
        optimizer.step()
    linear, norm = optimizer.blocks
    weight = linear.moments_weight.item()
    G, A = (linear.moments[name].double() / weight for name in ("rows", "columns"))
    d = norm.moments["diagonal"].double() / weight
    means = [G.trace() / 4 * A.trace() / 6, d.mean()]
    mean = (means[0] * 24 + means[1] * 8) / 32  # over all parameters
    gamma = [DELTA**2 * (f * mean).sqrt() / 30 for f in means]
    pi = (A.trace() / 6 / (G.trace() / 4)).sqrt()
    eye = partial(torch.eye, dtype=torch.float64)
    damped = [G + gamma[0].sqrt() / pi * eye(4), A + gamma[0].sqrt() * pi * eye(6)]
    want = torch.kron(*map(torch.linalg.inv, damped))
    exact = 1e-9 if dtype == torch.float64 else 1e-4
    Q = dense_q(linear.structure, linear.structure.fishleg_aux).double()
    assert relative(Q, want * (means[0] * mean).sqrt()) <= exact
    want = (means[1] * mean).sqrt() / (d + gamma[1])
    assert relative(norm.structure.fishleg_aux["d"].double() ** 2, want) <= exact


def test_the_auxiliary_loss_is_that_of_a_damping_for_each_block() -> None:
    """½ vᵀ(F+Γ)v − uᵀv in the model's own coordinates, Γ = δ² times the block's unit over T, F explicit."""
    net = nn.Sequential(nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)).double()
    likelihood = CategoricalLikelihood()
    optimizer = FishLeg(
        net, likelihood=likelihood, lr=0.0, damping=DELTA, damping_scale="relative", update_aux_every=0, anchor_every=0,
        curvature_batch=None, backend="reference",
    )  # fmt: skip
    x = randn(20, 5)
    likelihood.nll(torch.arange(20) % 3, net(x)).backward()
    optimizer.step()  # starts Q
    blocks = optimizer.blocks
    for block in blocks:
        block.allocate_adam()
    F = explicit_fisher(net, x, "categorical")
    scales = torch.cat([b.unit.expand(b.momentum.numel()) for b in blocks])
    Q = torch.block_diag(*[dense_q(b.structure, b.structure.fishleg_aux) for b in blocks]) / scales  # of the model's F
    g = torch.cat([p.grad.reshape(-1) for p in net.parameters()])
    u = g / (g / scales.sqrt()).norm()
    v = Q @ u
    want = 0.5 * v @ (F + DELTA**2 / 20 * torch.diag(scales)) @ v - u @ v
    with torch.no_grad():
        got, ok = optimizer._learner.update(blocks, [p.grad for p in net.parameters()])
    assert ok and relative(got, want) <= 1e-10


def test_blocks_whose_fisher_matrix_is_zero_stay_finite() -> None:
    """Below a layer that starts at zero nothing is seen, nor of a unit that no input reaches."""
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    nn.init.zeros_(net[3].weight)
    nn.init.zeros_(net[0].weight)
    likelihood = CategoricalLikelihood()
    for normalize in ("rms", "spectral"):
        optimizer = FishLeg(
            net, likelihood=likelihood, damping=DELTA, damping_scale="relative", normalize=normalize, update_aux_every=1
        )
        for step in range(12):
            optimizer.zero_grad()
            likelihood.nll(torch.arange(8) % 3, net(randn(8, 4, seed=step) * (step > 5))).backward()
            optimizer.step()
        tensors = [t for b in optimizer.blocks for t in (*b.structure.fishleg_aux.values(), *b.params)]
        assert all(torch.isfinite(t).all() for t in tensors)
        assert optimizer.diagnostics()["skipped_steps"] == 0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"normalize": None}, "normalize should be one of"),
        ({"normalize": "trust"}, "but is: 'trust'"),
        ({"init": "sgd", "anchor_every": 0, "aux_update": "adam"}, "init='kfac', anchor_every > 0 or aux_update"),
        ({"damping_scale": "mean"}, "damping_scale should be one of"),
    ],
)
def test_what_does_not_go_together(wrong: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FishLeg(nn.Linear(2, 2), likelihood=CategoricalLikelihood(), **{"damping_scale": "relative", **wrong})
