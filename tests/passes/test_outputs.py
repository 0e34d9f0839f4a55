"""Models that return more than what a likelihood scores train as those that return it alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fishleg_fast import CategoricalLikelihood, FishLeg, Likelihood

WAYS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "alone": lambda logits, loss: logits,
    "logits, loss": lambda logits, loss: (logits, loss),
    "loss, logits": lambda logits, loss: (loss, logits),
    "a list": lambda logits, loss: [logits, None],
    "with indices": lambda logits, loss: (logits.argmax(1), logits),
    "a mapping": lambda logits, loss: {"loss": loss, "logits": logits},
    "an object": lambda logits, loss: SimpleNamespace(loss=loss, logits=logits),
}


class Net(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        self.way = way

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        logits = self.layers(x)
        loss = logits.sum() if y is None else nn.functional.cross_entropy(logits, y)
        self.seen = logits, loss
        return WAYS[self.way](logits, loss)


def train(way: str, **options: Any) -> tuple[list[Tensor], dict]:
    net = Net(way)
    optimizer = FishLeg(net, likelihood=CategoricalLikelihood(), lr=0.05, update_aux_every=2, anchor_every=3, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(7):
        x, y = torch.randn(24, 5, generator=generator), torch.randint(3, (24,), generator=generator)
        optimizer.zero_grad()
        net(x, y)
        net.seen[1].backward()
        optimizer.step()
    return [p.detach() for p in net.parameters()], optimizer.diagnostics()


@pytest.mark.parametrize("fisher", ["ggn", "hessian"])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "alone"])
def test_what_is_scored_is_found(way: str, fisher: str) -> None:
    mine, told = train(way, fisher=fisher)
    want, expected = train("alone", fisher=fisher)
    assert told["aux_steps"] == expected["aux_steps"] == 4 and told["skipped_aux_steps"] == 0
    assert all(torch.equal(a, b) for a, b in zip(mine, want, strict=True))


def test_without_any_it_is_refused() -> None:
    WAYS["nothing"] = lambda logits, loss: (loss, "text")
    try:
        with pytest.raises(TypeError, match=r"should be a tensor, have one as .logits or \['logits'\], or be a tuple"):
            train("nothing")
    finally:
        del WAYS["nothing"]


class Heads(nn.Module):
    """What two linear layers return, as ``way`` has it."""

    def __init__(self, way: Callable[[Tensor, Tensor], Any], width: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.way = nn.Linear(5, width), nn.Linear(5, 1), way

    def forward(self, x: Tensor) -> Any:
        return self.way(self.first(x), self.second(x))


def told(net: nn.Module, likelihood: Likelihood, x: Tensor, steps: int = 3) -> list[str]:
    """The warnings of some steps on a loss of all that the model returns."""
    optimizer = FishLeg(net, likelihood=likelihood, anchor_every=2, lr=0.01)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.zero_grad()
            tensors = torch.utils._pytree.tree_leaves(net(x))
            sum(t.square().mean() for t in tensors if t.requires_grad).backward()
            optimizer.step()
    return [str(w.message) for w in found]


def test_heads_that_are_left_out_are_told_of_once() -> None:
    for way, taken, other in (
        (lambda a, b: (a, b), "(8, 3)", "(8, 1)"), (lambda a, b: [b, a], "(8, 1)", "(8, 3)")
    ):  # fmt: skip
        (message,) = told(Heads(way), CategoricalLikelihood(), torch.randn(24, 5))
        assert f"the first tensor alone, of shape {taken} for a part of the batch, and not" in message
        assert f"those of shape {other}" in message
        assert "return one tensor of them all" in message


@pytest.mark.parametrize(
    "way",
    [
        lambda a, b: (a, b.mean()),
        lambda a, b: (b.mean(), a),
        lambda a, b: (a, b.detach()),
        lambda a, b: (a, (b, b)),  # past keys and values, hidden states
        lambda a, b: (a, b[:7]),
        lambda a, b: {"logits": a, "value": b},
    ],
)
def test_what_is_no_head_is_not_told_of(way: Callable[[Tensor, Tensor], Any]) -> None:
    assert told(Heads(way), CategoricalLikelihood(), torch.randn(24, 5)) == []


def test_a_dimension_of_classes_that_nobody_chose_is_told_of_once() -> None:
    x = torch.randn(8, 4, 5)
    (message,) = told(Heads(lambda a, b: a), CategoricalLikelihood(), x)
    assert "of shape (8, 4, 3)" in message and "class_dim=-1" in message
    assert told(Heads(lambda a, b: a), CategoricalLikelihood(class_dim=1), x) == []
