"""Models of all kinds: which of their layers' gradients count as low-rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

from support.gradient_tap import FIRST_DENSE, LOW_RANK, Custom, Training, check, take_step, two_layers, usual


def doubled(*args: Any) -> Tensor:
    return 2 * args[-1]


def changed(change: Callable[[nn.Module], Any]) -> nn.Module:
    """Two layers, the first one changed before there is an optimizer."""
    net = two_layers()
    change(net[0])
    return net


def blind_bias(scale: float) -> nn.Module:
    """The bias's share of the layer's gradient is small beside that of large inputs."""
    net = changed(lambda layer: layer.bias.register_hook(torch.zeros_like))
    net[0].register_forward_pre_hook(lambda module, args: scale * args[0])
    return net


def second_hand(keep: bool) -> nn.Module:
    """A model that had an optimizer before, which may still be there."""
    t = Training(two_layers())
    take_step(t)
    t.net.first = t.optimizer if keep else None
    return t.net


def subclass(forward: Callable[[nn.Linear, Tensor], Tensor]) -> nn.Module:
    return Custom(first=type("Subclass", (nn.Linear,), {"forward": forward})(20, 20))


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 16))
    net[2].weight = net[0].weight
    return net


BUILT: dict[str, tuple] = {  # what is low-rank, the model, and what is done to it once it has an optimizer
    "weight hook before": (FIRST_DENSE, lambda: changed(lambda f: f.weight.register_hook(doubled))),
    "weight hook after": (FIRST_DENSE, two_layers, lambda t: t.net[0].weight.register_hook(doubled)),
    "weight hook, small": (FIRST_DENSE, lambda: changed(lambda f: f.weight.register_hook(lambda g: 1.001 * g))),
    "bias hook": (FIRST_DENSE, lambda: blind_bias(1.0)),
    "bias hook, large inputs": (FIRST_DENSE, lambda: blind_bias(100.0)),
    "forward hook before": (LOW_RANK, lambda: changed(lambda f: f.register_forward_hook(doubled))),
    "forward hook after": (LOW_RANK, two_layers, lambda t: t.net[0].register_forward_hook(doubled)),
    "forward hook in front": (FIRST_DENSE, two_layers, lambda t: t.net[0].register_forward_hook(doubled, prepend=True)),
    "forward pre-hook": (LOW_RANK, two_layers, lambda t: t.net[0].register_forward_pre_hook(lambda m, a: 2 * a[0])),
    "another optimizer before": (LOW_RANK, lambda: second_hand(False)),
    "another optimizer beside": (LOW_RANK, lambda: second_hand(True)),
    "scaling subclass": (FIRST_DENSE, lambda: subclass(lambda f, x: nn.Linear.forward(f, 3 * x))),
    "adapter subclass": (LOW_RANK, lambda: subclass(lambda f, x: nn.Linear.forward(f, x) + torch.sin(x))),
    "weight_norm": ([True], lambda: Custom(first=parametrizations.weight_norm(nn.Linear(20, 20)))),
    "pruned later": (FIRST_DENSE, two_layers, lambda t: prune.l1_unstructured(t.net[0], "weight", 0.3)),
    "pruned later, no bias": (
        FIRST_DENSE,
        lambda: two_layers(bias=False),
        lambda t: prune.l1_unstructured(t.net[0], "weight", 0.3),
    ),
    "parametrized later": (FIRST_DENSE, two_layers, lambda t: register_parametrization(t.net[0], "weight", nn.ReLU())),
    "tied weights": (FIRST_DENSE, tied),
    "weight used elsewhere": (FIRST_DENSE, lambda: Custom(lambda f, x: f(x) + x @ f.weight)),
    "checkpoint": (LOW_RANK, lambda: Custom(lambda f, x: checkpoint(f, x, use_reentrant=False))),
    "reentrant": (LOW_RANK, lambda: Custom(lambda f, x: checkpoint(f, x.requires_grad_(), use_reentrant=True))),
    "in-place ReLU": (LOW_RANK, lambda: two_layers(nn.ReLU(inplace=True))),
    "called twice": (LOW_RANK, lambda: Custom(lambda f, x: f(torch.sin(f(x))))),
    "two large calls": (FIRST_DENSE, lambda: Custom(lambda f, x: sum(f(c * x.repeat(3, 1))[:3] for c in (1, 2)))),
    "named argument": (FIRST_DENSE, lambda: Custom(lambda f, x: f(input=x))),
    "1-D input": (LOW_RANK, lambda: Custom(lambda f, x: f(x[0]) + x)),
    "no rows at all": (FIRST_DENSE, lambda: Custom(lambda f, x: x + f(x[:0]).sum())),
    "some calls without rows": (LOW_RANK, lambda: Custom(lambda f, x: f(x) + f(x[:0]).sum())),
    "several positions": (LOW_RANK, lambda: Custom(lambda f, x: f(torch.stack([x, -2 * x], 1)).prod(1))),
    "compiled": ([False, False], lambda: torch.compile(two_layers(), backend="eager")),
}


@pytest.mark.parametrize("name", BUILT)
def test_models_of_all_kinds(name: str) -> None:
    expected, *built = BUILT[name]
    check(usual, expected, *built)
