"""The published way, an opponent, computes what it says."""

import pytest
import torch
from torch import nn

from benchmarks.common.published import Published
from fishleg_fast import BernoulliLikelihood
from support.dense import flat, randn, relative


def published(bias=True, **settings):
    """A small model in float64 with random λ, and gradients of one batch; (optimizer, inputs)."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4, bias=bias), nn.ReLU(), nn.Linear(4, 5)).double()
    optimizer = Published(model, BernoulliLikelihood(), **settings)
    for k, layer in enumerate(optimizer.layers):
        layer.R.data.copy_(randn(*layer.R.shape, seed=2 * k))
        layer.L.data.copy_(randn(*layer.L.shape, seed=2 * k + 1))
    inputs = randn(6, 5, seed=9).sigmoid()
    optimizer.likelihood.nll(inputs, model(inputs)).backward()
    return optimizer, inputs


@pytest.mark.parametrize("bias", [True, False])
def test_published_theta_step_follows_the_dense_kronecker_matrix(bias):
    optimizer, _ = published(bias, lr=0.3, beta=0.5)
    before = [p.detach().clone() for p in optimizer.params]
    want = []
    for layer in optimizer.layers:
        w, b = layer.weight.grad, None if layer.bias is None else layer.bias.grad
        g = w if b is None else torch.cat([w, b[:, None]], 1)
        Q = torch.kron(layer.R.T @ layer.R, layer.L @ layer.L.T).detach()
        natural = (Q @ g.reshape(-1)).reshape(g.shape)
        want += [natural] if b is None else [natural[:, :-1], natural[:, -1]]
    optimizer.theta_step()
    optimizer.theta_step()  # m = Qg (1 − β), then Qg (1 − β²)
    moved = flat([p.detach() - q for p, q in zip(optimizer.params, before, strict=True)])
    assert relative(moved, flat([-0.3 * (0.5 + 0.75) * w for w in want])) < 1e-12


def test_published_fisher_product_is_the_hessian_on_the_drawn_labels():
    optimizer, inputs = published()
    model, likelihood = optimizer.model, optimizer.likelihood
    before = [p.detach().clone() for p in optimizer.params]
    vs = [randn(*layer.momentum.shape, seed=3) for layer in optimizer.layers]
    torch.manual_seed(5)
    got = optimizer.fisher_product(inputs, vs)
    assert all(torch.equal(p, q) for p, q in zip(optimizer.params, before, strict=True))
    torch.manual_seed(5)
    labels = likelihood.draw(model(inputs).detach())
    grads = torch.autograd.grad(likelihood.nll(labels, model(inputs)), optimizer.params, create_graph=True)
    pieces = [piece for layer, v in zip(optimizer.layers, vs, strict=True) for piece in layer.split(v)]
    want = torch.autograd.grad(grads, optimizer.params, pieces)
    got = [piece for layer, Fv in zip(optimizer.layers, got, strict=True) for piece in layer.split(Fv)]
    assert relative(flat(got), flat(want)) < 1e-6


def test_published_aux_gradient_is_the_closed_form(monkeypatch):
    optimizer, inputs = published(damping=0.2, aux_lr=0.1, curvature_batch=3)
    products = [randn(*layer.momentum.shape, seed=4) for layer in optimizer.layers]
    seen = []
    monkeypatch.setattr(optimizer, "fisher_product", lambda x, vs: seen.append(len(x)) or products)
    λ = [{name: getattr(layer, name).detach().clone() for name in "RL"} for layer in optimizer.layers]
    gs = [layer.gradient() for layer in optimizer.layers]
    norm = flat(gs).norm()
    optimizer.aux_update(inputs)
    assert seen == [3]
    for layer, aux, g, Fv in zip(optimizer.layers, λ, gs, products, strict=True):
        R, L = aux["R"], aux["L"]
        P, S, u = R.T @ R, L @ L.T, g / norm
        w = Fv + 0.2 * (P @ u @ S) - u
        M, N = u.T @ P @ w, w @ S @ u.T
        want = {"L": (M + M.T) @ L, "R": R @ (N + N.T)}
        for name in "RL":
            assert relative(getattr(layer, name).grad, want[name]) < 1e-12
            moved = getattr(layer, name).detach() - aux[name]
            assert relative(moved, -0.1 * want[name].sign()) < 1e-4  # Adam's first step


def test_published_step_updates_aux_when_due_and_refuses_other_layers():
    optimizer, inputs = published(update_aux_every=2)
    calls = []
    optimizer.aux_update = calls.append
    for _ in range(3):
        optimizer.step(inputs)
    assert len(calls) == 2
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="call backward"):
        optimizer.theta_step()
    with pytest.raises(ValueError, match=r"nn\.Linear only"):
        Published(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), BernoulliLikelihood())
