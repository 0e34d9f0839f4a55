"""A model that is compiled beside an optimizer is compiled once, and the optimizer sees what it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fishleg_fast import FishLeg, GaussianLikelihood

LIKELIHOOD = GaussianLikelihood()


class Net(nn.Module):
    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.call = nn.Linear(6, 8), nn.Linear(8, 3), call

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.b(torch.tanh(self.a(self.call(*args, **kwargs))))


def x() -> Tensor:
    return torch.randn(16, 6)


GIVEN: dict[str, tuple[Callable[..., Tensor], Callable[[], tuple[tuple, dict[str, Any]]]]] = {
    "a tensor": (lambda x: x, lambda: ((x(),), {})),
    "named": (lambda x, z: x + z, lambda: ((x(),), {"z": x()})),
    "nested": (lambda d: d["x"] + d["l"][0] + d["l"][1][0], lambda: (({"x": x(), "l": [x(), (x(),)]},), {})),
    "twice the same": (lambda x, z: x + z, lambda: ((x(),) * 2, {})),
}
ORDERS = ["optimizer first", "compiled first", "in place, optimizer first", "in place, compiled first"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", GIVEN)
def test_it_is_compiled_once(name: str, order: str) -> None:
    torch._dynamo.reset()
    call, given = GIVEN[name]
    net, graphs = Net(call), []

    def backend(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def compiled() -> nn.Module:
        if "in place" not in order:
            return torch.compile(net, backend=backend, fullgraph=True)
        net.compile(backend=backend, fullgraph=True)
        return net

    forward = compiled() if "compiled first" in order else None
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, update_aux_every=2, anchor_every=2)
    forward = compiled() if forward is None else forward
    for _ in range(10):  # more than torch compiles of one function
        args, kwargs = given()
        optimizer.zero_grad()
        LIKELIHOOD.nll(torch.zeros(16, 3), forward(*args, **kwargs)).backward()
        optimizer.step()
    assert len(graphs) == 1 and optimizer.diagnostics()["aux_steps"] == 5
    inputs = optimizer._passes.inputs()
    with torch.no_grad():
        assert torch.equal(call(*inputs.args, **inputs.kwargs), call(*args, **kwargs))
    assert optimizer._passes.inputs("auto").size() == 4  # what runs over the batch is known
