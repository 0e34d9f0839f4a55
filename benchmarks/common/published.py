"""FishLeg the eager way of the published library, as an opponent for timing: layer by layer, dense, uncached.

Written from the library's description, with nothing made slower than it has to be: `multi_dot` chooses the
cheapest order of the five-matrix product, and the curvature batch is as small as fishleg_fast's. Only what
decides the time is here; the published library's momentum, after Q, is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Layer:
    """A Linear as one matrix (m, n) of m outputs, and n inputs with the bias as last column; and its λ.

    Q u = RᵀR u LLᵀ with R (m, m) and L (n, n), both multiples of the identity at the start: Q₀ = scale·I.
    """

    def __init__(self, linear: nn.Linear, scale: float) -> None:
        self.weight, self.bias = linear.weight, linear.bias
        m, n = linear.out_features, linear.in_features + (self.bias is not None)
        like = {"dtype": self.weight.dtype, "device": self.weight.device}
        self.R = nn.Parameter(scale**0.25 * torch.eye(m, **like))
        self.L = nn.Parameter(scale**0.25 * torch.eye(n, **like))
        self.momentum = torch.zeros(m, n, **like)

    def params(self) -> list[nn.Parameter]:
        """The weight, and the bias if there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def matrix(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors of the parameters' shapes -> (m, n), a copy where there is a bias."""
        return tensors[0] if self.bias is None else torch.cat([tensors[0], tensors[1][:, None]], dim=1)

    def split(self, matrix: Tensor) -> list[Tensor]:
        """(m, n) -> views of the parameters' shapes."""
        return [matrix] if self.bias is None else [matrix[:, :-1], matrix[:, -1]]

    def gradient(self) -> Tensor:
        """The loss's gradient, (m, n)."""
        grads = [p.grad for p in self.params()]
        if any(g is None for g in grads):
            raise RuntimeError("no gradient: call backward() before the step")
        return self.matrix([g for g in grads if g is not None])

    def qv(self, u: Tensor) -> Tensor:
        """Q u from λ itself, every time; (m, n)."""
        return torch.linalg.multi_dot((self.R.T, self.R, u, self.L, self.L.T))


class Published:
    """θ step and λ update, to be called and timed apart; `step` does what a training loop needs.

    The model's trainable parameters should all be those of its Linears (ValueError otherwise). `likelihood` has
    nll(targets, outputs) and draw(outputs).
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Any,
        lr: float = 1e-3,
        aux_lr: float = 1e-3,
        aux_eps: float = 1e-8,
        beta: float = 0.9,
        damping: float = 0.1,
        scale: float = 1.0,
        update_aux_every: int = 10,
        curvature_batch: int = 32,
    ) -> None:
        self.model, self.likelihood, self.lr, self.beta, self.damping = model, likelihood, lr, beta, damping
        self.update_aux_every, self.curvature_batch = update_aux_every, curvature_batch
        self.layers = [Layer(module, scale) for module in model.modules() if isinstance(module, nn.Linear)]
        self.params = [p for layer in self.layers for p in layer.params()]
        if {id(p) for p in model.parameters()} != {id(p) for p in self.params}:
            raise ValueError("model should have parameters in nn.Linear only, but has others")
        self.aux = torch.optim.Adam([t for layer in self.layers for t in (layer.R, layer.L)], lr=aux_lr, eps=aux_eps)
        self.steps = 0

    def zero_grad(self) -> None:
        """Forget the gradients, as a torch optimizer does."""
        for p in self.params:
            p.grad = None

    def step(self, inputs: Tensor) -> None:
        """A training step after backward(): λ first where it is due, then θ. `inputs`: of the last batch."""
        if self.steps % self.update_aux_every == 0:
            self.aux_update(inputs)
        self.theta_step()
        self.steps += 1

    @torch.no_grad()
    def theta_step(self) -> None:
        """m ← βm + (1−β)Q g, θ ← θ − lr·m, layer by layer."""
        for layer in self.layers:
            layer.momentum.lerp_(layer.qv(layer.gradient()), 1 - self.beta)
            for p, m in zip(layer.params(), layer.split(layer.momentum), strict=True):
                p.add_(m, alpha=-self.lr)

    def aux_update(self, inputs: Tensor) -> None:
        """One Adam step of λ on 𝒜 = ½ vᵀ(F+γI)v − uᵀv, v = Q u, by autograd through the five-matrix products."""
        gs = [layer.gradient() for layer in self.layers]
        norm = torch.stack([g.norm() for g in gs]).norm()
        us = [g / norm for g in gs]
        with torch.enable_grad():
            vs = [layer.qv(u) for layer, u in zip(self.layers, us, strict=True)]
        constant = [v.detach() for v in vs]
        products = self.fisher_product(inputs[: self.curvature_batch], constant)
        self.aux.zero_grad()
        surrogate = sum(
            ((Fv + self.damping * c - u) * v).sum() for u, v, c, Fv in zip(us, vs, constant, products, strict=True)
        )
        assert isinstance(surrogate, Tensor)
        surrogate.backward()
        self.aux.step()

    def fisher_product(self, inputs: Tensor, vs: Sequence[Tensor]) -> list[Tensor]:
        """F v ≈ ‖v‖ (∇ℓ(θ+εv̂) − ∇ℓ(θ−εv̂))/2ε on labels drawn from the model; (m, n) of each layer.

        ε = ‖θ‖ ∛eps, the balance of rounding and truncation. θ is restored from copies.
        """
        flat = [piece for layer, v in zip(self.layers, vs, strict=True) for piece in layer.split(v)]
        with torch.no_grad():
            labels = self.likelihood.draw(self.model(inputs))
            saved = [p.clone() for p in self.params]
            norm = torch.stack([v.norm() for v in vs]).norm()
            size = torch.stack([p.norm() for p in saved]).norm()
            step = float(torch.finfo(norm.dtype).eps ** (1 / 3) * size / norm)  # ε/‖v‖
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, kept, v in zip(self.params, saved, flat, strict=True):
                    torch.add(kept, v, alpha=sign * step, out=p)
            with torch.enable_grad():
                sides.append(torch.autograd.grad(self.likelihood.nll(labels, self.model(inputs)), self.params))
        with torch.no_grad():
            for p, kept in zip(self.params, saved, strict=True):
                p.copy_(kept)
        differences = iter([(a - b).div_(2 * step) for a, b in zip(*sides, strict=True)])
        return [layer.matrix([next(differences) for _ in layer.params()]) for layer in self.layers]
