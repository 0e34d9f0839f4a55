"""F v of embeddings of padding, whose row backward passes take as a constant: exact, by tangents, tied or not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from fishleg_fast import CategoricalLikelihood, FishLeg
from support.dense import relative


class Net(nn.Module):
    """Words to logits; the last weight may be the words' vectors."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 3, padding_idx=1)
        self.head = nn.Linear(3, 5, bias=False)
        if tied:
            self.head.weight = self.words.weight
        with torch.no_grad():
            self.words.weight[1] = 0.4

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(x).mean(1)))


@pytest.mark.parametrize("tied", [False, True])
def test_fisher_vector_product(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, likelihood = Net(tied).double(), CategoricalLikelihood()
    optimizer = FishLeg(
        net, likelihood=likelihood, u_sampling="gaussian", update_aux_every=1, curvature_batch=None, anchor_every=0,
        aux_update="adam",
        init="sgd", structure="diagonal", backend="reference",
    )  # fmt: skip
    seen: list[tuple[Any, Any]] = []
    ops = optimizer._learner.ops

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(ops, name)

        def lambda_step(self, blocks: Any, us: Any, vs: Any, fvs: Any, options: Any) -> Any:
            flat = lambda found: torch.cat([getattr(t, "dense", t).flatten() for t in found])
            seen.append((flat(vs), flat(fvs)))
            return ops.lambda_step(blocks, us, vs, fvs, options)

    monkeypatch.setattr(optimizer._learner, "ops", Watched())
    for _ in range(3):
        x, y = torch.randint(5, (4, 3)), torch.randint(5, (4,))
        x[0, 0] = 1
        params = {name: p.detach().clone() for name, p in net.named_parameters()}
        J = jacrev(lambda p, x=x: functional_call(net, p, (x,)))(params)
        whole = torch.cat([J[name].flatten(2) for name in params], dim=-1)
        p = functional_call(net, params, (x,)).softmax(-1)
        H = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / 4
        F = torch.einsum("pai,pab,pbj->ij", whole, H, whole)
        optimizer.zero_grad()
        likelihood.nll(y, net(x)).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no other way is taken
            optimizer.step()
        v, found = seen[-1]
        assert relative(found, F @ v) < 1e-12
