"""Whatever a model is given without the optimizer it can be given with it: what cannot be copied is used as it is."""

from __future__ import annotations

import collections
import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fishleg_fast import FishLeg, GaussianLikelihood
from fishleg_fast.passes.inputs import tree_map
from support.dense import randn


class ReadOnly(Mapping):
    """Without a constructor from a mapping."""

    def __init__(self, *, x: Tensor) -> None:
        self._x = x

    def __getitem__(self, key: str) -> Tensor:
        return {"x": self._x}[key]

    def __iter__(self) -> Iterator[str]:
        return iter(["x"])

    def __len__(self) -> int:
        return 1


class Frozen(dict):
    def __setitem__(self, key: object, value: object) -> None:
        raise TypeError("frozen")


class Tagged(dict):
    """With a constructor and an attribute of its own."""

    def __init__(self, tag: str, x: Tensor) -> None:
        super().__init__(x=x)
        self.tag = tag


class Pair(tuple):
    def __new__(cls, a: Tensor, b: Tensor | None = None) -> Pair:
        return super().__new__(cls, (a, b))


class Stack(list):
    def __init__(self, x: Tensor, depth: int) -> None:
        super().__init__([x] * depth)
        self.depth = depth


class Point(NamedTuple):
    x: Tensor
    name: str


@dataclasses.dataclass
class Record:
    x: Tensor


X = randn(40, 6).float()
GIVEN: dict[str, tuple[Any, Callable[[Any], Tensor]]] = {
    "defaultdict": (collections.defaultdict(list, x=X), lambda g: g["x"] if g["no"] == [] else g["no"]),
    "OrderedDict": (collections.OrderedDict(z=0, x=X), lambda g: [*g.values()][1]),
    "UserDict": (collections.UserDict(x=X), lambda g: g["x"]),
    "mapping proxy": (types.MappingProxyType({"x": X}), lambda g: g["x"]),
    "read-only mapping": (ReadOnly(x=X), lambda g: g["x"]),
    "frozen dict": (Frozen(x=X), lambda g: g["x"]),
    "dict with a constructor": (Tagged("name", X), lambda g: g["x"] * len(g.tag)),
    "tuple with a constructor": (Pair(X, X), lambda g: g[0] + g[1]),
    "tuple with an optional argument": (Pair(X), lambda g: g[0] if g[1] is None else g[1]),
    "list with a constructor": (Stack(X, 2), lambda g: g[0] + g[g.depth - 1]),
    "named tuple": (Point(X, "name"), lambda g: g.x * len(g.name)),
    "size": ((X, X.shape), lambda g: g[0].reshape(-1, g[1].numel() // len(X)) if type(g[1]) is torch.Size else g[1]),
    "dataclass": (Record(X), lambda g: g.x),
    "array": (X.numpy(), lambda g: torch.from_numpy(np.asarray(g))),
    "nested tensor": (torch.nested.nested_tensor([*X], layout=torch.jagged), lambda g: torch.stack(list(g.unbind()))),
    "sparse tensor": (X.to_sparse(), lambda g: g.to_dense()),
    "compressed tensor": (X.to_sparse_csr(), lambda g: g.to_dense()),
    "nothing": (None, lambda g: X),
}  # fmt: skip


class Net(nn.Module):
    def __init__(self, take: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.layer, self.take = nn.Linear(6, 3), take

    def forward(self, given: Any) -> Tensor:
        return self.layer(self.take(given))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:fisher='ggn' differentiates twice")
@pytest.mark.parametrize("by", ["tap", "loader"])
@pytest.mark.parametrize("name", GIVEN)
def test_a_forward_that_works_without_the_optimizer_works_with_it(name: str, by: str) -> None:
    given, take = GIVEN[name]
    plain = Net(take)
    want = plain(given)
    net, likelihood = Net(take), GaussianLikelihood()
    net.load_state_dict(plain.state_dict())
    loader = [((given,), 0)] if by == "loader" else None
    optimizer = FishLeg(net, likelihood=likelihood, aux_loader=loader, update_aux_every=10)
    for _ in range(2):
        got = net(given)
        likelihood.nll(torch.zeros_like(got), got).backward()
        optimizer.step()
    assert torch.equal(want, plain(given)) and optimizer.diagnostics()["aux_steps"] == 1
    assert not torch.equal(want, net(given))  # it was trained


@pytest.mark.parametrize("name", GIVEN)
def test_what_is_rebuilt_is_what_it_was(name: str) -> None:
    given = GIVEN[name][0]
    copied = tree_map(lambda t: t.clone(), given)
    assert type(copied) is type(given)
    if isinstance(given, (Mapping, tuple, list)):
        assert (
            len(copied) == len(given)
            and getattr(copied, "__dict__", {}).keys() == getattr(given, "__dict__", {}).keys()
        )


def test_what_was_one_object_stays_one() -> None:
    a, _, c = tree_map(lambda t: t.clone(), [X, X + 1, {"again": X}])
    assert a is c["again"] and a is not X


def test_an_array_that_the_model_writes_to_stays_the_user_s() -> None:
    class Writing(Net):
        def forward(self, given: Any) -> Tensor:
            if self.writing:
                given *= 0.5
            return super().forward(given)

    net, likelihood, array = Writing(GIVEN["array"][1]), GaussianLikelihood(), X.numpy().copy()
    net.writing = False
    optimizer = FishLeg(net, likelihood=likelihood, update_aux_every=10)
    likelihood.nll(torch.zeros(40, 3), net(array)).backward()
    net.writing = True
    optimizer.step()
    assert (array == X.numpy()).all()
