"""Wrong uses: mypy must report each marked line, with those codes, and no other line."""

from __future__ import annotations

from torch import Tensor, nn

from fishleg_fast import CategoricalLikelihood, FishLeg, FishModule, GaussianLikelihood
from fishleg_fast import NoSuchName as NoSuchName  # wrong: attr-defined


class NoQ(FishModule):
    def forward(self, x: Tensor) -> Tensor:
        return x


class OneTensorQ(FishModule):
    def Qv(self, v: Tensor) -> Tensor:  # wrong: override
        return v


def wrong(net: nn.Module) -> None:
    likelihood = CategoricalLikelihood()
    NoQ()  # wrong: abstract
    GaussianLikelihood(sigma="1")  # wrong: arg-type
    likelihood.nll(net)  # wrong: arg-type call-arg
    FishLeg(net, likelihood.terms, likelihood=likelihood)  # wrong: arg-type
    optimizer = FishLeg(net, likelihood=likelihood)
    FishLeg(net, likelihood=likelihood, learning_rate=1e-2)  # wrong: call-arg
    FishLeg(net, likelihood=likelihood, damping="10")  # wrong: arg-type
    FishLeg(net, likelihood=likelihood, structure=3)  # wrong: arg-type
    optimizer.settings.damping = 1.0  # wrong: misc
    optimizer.diagnostic()  # wrong: attr-defined
