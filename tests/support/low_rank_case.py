"""Models whose linear layers have low-rank gradients, and F v of low-rank v in them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fishleg_fast import FishLeg, GaussianLikelihood
from fishleg_fast.algebra.low_rank import LowRank
from fishleg_fast.algebra.matrix import Matrix, dense
from fishleg_fast.likelihoods import Likelihood
from support.dense import explicit_fisher, flat, randn, relative
from support.gradient_tap import Custom

EXACT = 1e-10


class Case:
    """A model after one backward pass, with its optimizer and low-rank v for the layers whose gradients are so."""

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood | None = None,
        after: Callable[[nn.Module], object] = lambda net: None,
        shape: tuple[int, ...] = (3, 6),
        params: Callable[[nn.Module], object] = lambda net: None,
        **options: object,
    ) -> None:
        self.net, self.likelihood = net.double(), (likelihood or GaussianLikelihood(0.5)).double()
        options = {"curvature_batch": None, "structure": "kron", **options}
        self.optimizer = FishLeg(self.net, likelihood=self.likelihood, params=params(net), **options)
        after(self.net)
        self.x = randn(*shape, seed=1)
        outputs = self.net(self.x)
        with torch.no_grad():
            targets = self.likelihood.draw(outputs)
        self.likelihood.nll(targets, outputs).backward()
        with torch.no_grad():
            self.blocks, self.gs = self.optimizer._gather()

    def vs(self) -> list[Matrix]:
        """Low-rank ones where the gradients are low-rank."""
        found: list[Matrix] = []
        for k, (b, g) in enumerate(zip(self.blocks, self.gs, strict=True)):
            m, n = b.shape
            v = LowRank(randn(2, m, seed=10 + k), randn(2, n, seed=20 + k))
            found.append(v if isinstance(g, LowRank) else v.dense)
        return found

    @torch.no_grad()
    def both(self) -> tuple[list[Matrix], list[Tensor]]:
        """F v by the usual route, and by the dense one."""
        vs = self.vs()
        aux = self.optimizer._learner
        state = aux.passes.generator.get_state()
        usual = aux._fisher_product(self.blocks, vs)
        aux.passes.generator.set_state(state)
        return usual, aux._dense_fisher_product(self.blocks, vs, aux._curvature_batch())

    def low_rank(self) -> list[bool]:
        """Of each matrix: whether its gradient is low-rank."""
        return [isinstance(g, LowRank) for b, g in zip(self.blocks, self.gs, strict=True) if b.shape[1] > 1]

    def explicit(self, kind: str, sigma: float = 0.5) -> list[Tensor]:
        """F v of each block by the explicit matrix."""
        params = list(self.net.parameters())
        wanted = [p.requires_grad for p in params]
        tangents = {id(p): torch.zeros_like(p) for p in params}
        for b, v in zip(self.blocks, self.vs(), strict=True):
            for part, piece in zip(b.parts, b.split(dense(v)), strict=True):
                tangents[id(part.param)] = piece
        for p in params:
            p.requires_grad_(True)
        product = explicit_fisher(self.net, self.x, kind, sigma) @ flat([tangents[id(p)] for p in params])
        for p, was in zip(params, wanted, strict=True):
            p.requires_grad_(was)
        pieces = dict(zip(map(id, params), product.split([p.numel() for p in params]), strict=True))
        return [b.matrix([pieces[id(p.param)].reshape(p.param.shape) for p in b.parts]) for b in self.blocks]

    def kept(self) -> tuple[list[Tensor], int]:
        """Parameters and gradients, and how many hooks there are."""
        tensors = [t.detach().clone() for p in self.net.parameters() for t in (p, p.grad) if t is not None]
        hooks = sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in self.net.modules()
        )
        return tensors, hooks


def mlp(bias: bool = True, activation: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8, bias=bias), activation or nn.Tanh(), nn.Linear(8, 5, bias=bias))


def custom(call: Callable[[nn.Module, Tensor], Tensor], **first: nn.Module) -> nn.Module:
    """Two layers, 6 -> 6 -> 5, the first one called by ``call``."""
    net = Custom(call, first.get("first") or nn.Linear(6, 6))
    net.b = nn.Linear(6, 5)
    return net


def check(case: Case, taken: bool = True, explicit: str | None = "gaussian") -> None:
    """F v by the usual route is the dense one's and the explicit matrix's, and nothing else has changed."""
    tensors, hooks = case.kept()
    got, want = case.both()
    for x, y, v in zip(got, want, case.vs(), strict=True):
        assert isinstance(x, LowRank) == (taken and isinstance(v, LowRank))
        assert relative(dense(x), y) <= EXACT
    for x, y in zip(got, case.explicit(explicit) if explicit else want, strict=True):
        assert relative(dense(x), y) <= EXACT
    after, left = case.kept()
    assert left == hooks and all(map(torch.equal, tensors, after))
    assert (not case.optimizer._passes.attempts("ggn", "low rank").failures) == (taken or True not in case.low_rank())
