"""Only what runs over the batch is cut: a part of a batch is a part of what the model computes, or there is none."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from fishleg_fast import CategoricalLikelihood, FishLeg, GaussianLikelihood
from fishleg_fast.passes.inputs import Inputs
from fishleg_fast.passes.isolated import IsolatedPasses
from support.dense import randn
from support.unseen import Unseen

B, WANTED = 48, 8


class Model(nn.Module):
    """Two layers, 5 -> 6 -> 3, about which ``call(first, last, *args)`` does what is to be tried."""

    def __init__(self, call: Callable[..., Any], layers: tuple[nn.Module, nn.Module] | None = None) -> None:
        super().__init__()
        self.a, self.b = layers or (nn.Linear(5, 6), nn.Linear(6, 3))
        self.call = call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.a, self.b, *args, **kwargs)


def x(n: int = B, *shape: int) -> Tensor:
    return randn(n, *(shape or (5,)), seed=n).float()


def mlp(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
    return b(torch.tanh(a(x)))


def recurrent(a: nn.Module, b: nn.Module, x: Tensor, lengths: Any) -> Tensor:
    packed = pack_padded_sequence(x, torch.as_tensor(lengths), batch_first=True, enforce_sorted=False)
    return b(a(packed)[1][0])


def attention(a: nn.Module, b: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    h = a(x)
    return b(torch.softmax(h @ h.mT + mask, -1) @ h).mean(1)


def graph(a: nn.Module, b: nn.Module, x: Tensor, adjacency: Tensor) -> Tensor:
    return adjacency @ b(torch.relu(adjacency @ a(x)))


RNN = (nn.GRU(5, 6, batch_first=True), nn.Linear(6, 3))
WORDS = ["w" * n for n in range(B)]
LENGTHS = [1 + k % 4 for k in range(B)]
ADJACENCY = x(B, B).softmax(1)

NESTED = torch.nested.nested_tensor([x(3), x(2)] * 20, layout=torch.jagged)
PACKED = pack_padded_sequence(x(B, 4, 5), torch.tensor(LENGTHS), True, False)

# what the model does, its arguments at B samples (and its layers): those which are told apart at the first call
CUT: dict[str, tuple] = {
    "one tensor": (mlp, (x(),)),
    "a mapping": (lambda a, b, batch: mlp(a, b, batch["x"] + batch["z"]), ({"x": x(), "z": x() * 2},)),
    "nested": (lambda a, b, t: mlp(a, b, t[0] + t[1]["z"][0]), ((x(), {"z": [2 * x()]}),)),
    "numbers beside it": (lambda a, b, x, scale, name: mlp(a, b, scale * x), (x(), torch.tensor(2.0), "name")),
    "lengths, a list": (recurrent, (x(B, 4, 5), LENGTHS), RNN),
    "lengths, a tuple": (recurrent, (x(B, 4, 5), tuple(LENGTHS)), RNN),
    "lengths, an array": (recurrent, (x(B, 4, 5), np.array(LENGTHS)), RNN),
    "lengths, a tensor": (recurrent, (x(B, 4, 5), torch.tensor(LENGTHS)), RNN),
    "words": (lambda a, b, x, words: mlp(a, b, x * torch.tensor([[len(w)] for w in words])), (x(), WORDS)),
    "a list of images": (lambda a, b, xs: mlp(a, b, torch.stack(xs).mean(1)), (list(x(B, 3, 5)),)),
    "a list of mappings": (lambda a, b, xs: mlp(a, b, torch.stack([x["x"] for x in xs])), ([{"x": t} for t in x()],)),
    "flat outputs": (lambda a, b, x: mlp(a, b, x).reshape(-1, 3), (x(B, 4, 5),)),
    "several outputs": (lambda a, b, x: (mlp(a, b, x), a(x), x.new_zeros(4)), (x(),)),
    "three of a kind": (lambda a, b, x, y, z: (mlp(a, b, x), a(y), a(z)), (x(), x(B, 5) + 1, x(B, 5) + 2)),
    "losses too": (lambda a, b, x, y: {"loss": (mlp(a, b, x) * y).mean(), "logits": mlp(a, b, x)}, (x(), x(B, 3))),
    "an unused one": (lambda a, b, x, labels: mlp(a, b, x), (x(), torch.arange(B) % 3)),
}  # fmt: skip

# ... and those where it takes a call of another size; what they are then given
LATER: dict[str, tuple] = {
    "a mask of the batch's size": (attention, lambda n: (x(n, B, 5), x(B, B))),
    "a mask": (attention, lambda n: (x(n, 7, 5), x(7, 7))),
    "a mask for all": (attention, lambda n: (x(n, 7, 5), x(1, 7, 7))),
    "prototypes": (lambda a, b, x, p: b(a(x) @ a(p).T @ a(p)), lambda n: (x(n), x(B))),
    "prototypes that are outputs": (lambda a, b, x, p: (b(a(x) + a(p).mean(0)), a(p)), lambda n: (x(n), x(B))),
    "their mean": (lambda a, b, x, p: mlp(a, b, x + p.mean(0)), lambda n: (x(n), x(B))),
    "a vector": (lambda a, b, x, p: mlp(a, b, x * p.sum()), lambda n: (x(n), x(B, 1)[:, 0])),
    "numbers in a list": (lambda a, b, x, p: mlp(a, b, x * sum(p)), lambda n: (x(n), [0.1] * B)),
    "longest sequence": (lambda a, b, x, n: mlp(a, b, x[:, : max(n)]), lambda n: (x(n, 4, 5), LENGTHS[:n])),
}  # fmt: skip

# ... and those which are never cut, whatever the sizes of other calls
WHOLE: dict[str, tuple] = {
    "a graph": (graph, (x(), ADJACENCY)),
    "a sparse graph": (graph, (x(), ADJACENCY.to_sparse())),
    "edges": (lambda a, b, x, e: x[:, :3].index_add(0, e[1], mlp(a, b, x[e[0]])), (x(), torch.randint(B, (2, 99)))),
    "neighbours": (lambda a, b, x, e: mlp(a, b, x[e].mean(1)), (x(), torch.randint(B, (B, 4)))),
    "a fixed size": (lambda a, b, x: mlp(a, b, x).view(B, 3), (x(),)),
    "time first": (lambda a, b, x: mlp(a, b, x[-1]), (x(B, 10, 5),)),
    "one observation": (lambda a, b, x: mlp(a, b, x.view(-1, 5).mean(0)), (x(60, 1)[:, 0],)),
    "the batch is one output": (lambda a, b, x: mlp(a, b, x).mean(), (x(),)),
    "an object": (lambda a, b, x, o: mlp(a, b, x * o.scale.mean()), (x(), SimpleNamespace(scale=x()))),
    "a nested tensor": (lambda a, b, x: mlp(a, b, torch.nested.to_padded_tensor(x, 0.0).mean(1)), (NESTED,)),
    "a packed sequence": (lambda a, b, x: b(a(x)[1][0]), (PACKED,), RNN),
}  # fmt: skip


def passes_of(model: nn.Module, may_cut: bool = True) -> IsolatedPasses:
    return IsolatedPasses(model, None, None, GaussianLikelihood(), None, 0, may_cut=may_cut)


def first(outputs: Any) -> Tensor:
    outputs = outputs["logits"] if isinstance(outputs, dict) else outputs
    return outputs[0] if isinstance(outputs, tuple) else outputs


def check_part(model: nn.Module, inputs: Inputs, whole: Tensor, samples: int = B) -> None:
    """That it is a part of the batch, and the model's outputs are those of the batch."""
    assert inputs.size() == WANTED and inputs.part
    with torch.no_grad():  # which nobody sees
        part = first(model(*inputs.args, **inputs.kwargs))
    assert len(part) == len(whole) // samples * WANTED
    assert torch.allclose(part, whole[: len(part)], atol=1e-6)


@pytest.mark.parametrize("name", CUT)
def test_what_has_the_outputs_size_is_cut(name: str) -> None:
    call, args, *layers = CUT[name]
    model = Model(call, *layers)
    passes = passes_of(model)
    whole = first(model(*args))
    check_part(model, passes.inputs(WANTED), whole)
    assert passes.inputs().size() == B
    with torch.no_grad():
        assert torch.equal(first(model(*passes.inputs().args)), whole)


@pytest.mark.parametrize("name", LATER)
def test_a_second_size_proves_what_runs_over_the_batch(name: str) -> None:
    call, args = LATER[name]
    model = Model(call)
    passes = passes_of(model)
    for _ in range(2):
        whole = first(model(*args(B)))
        inputs = passes.inputs(WANTED)
        assert inputs.size() == 1 and torch.equal(first(model(*inputs.args)), whole)
    model(*args(20))  # which no pass of the optimizer's has seen
    whole = first(model(*args(B)))
    check_part(model, passes.inputs(WANTED), whole)


@pytest.mark.parametrize("name", WHOLE)
def test_what_belongs_together_stays_whole(name: str) -> None:
    call, args, *layers = WHOLE[name]
    model = Model(call, *layers)
    passes = passes_of(model)
    for _ in range(3):
        whole = model(*args)
        inputs = passes.inputs(WANTED)
        assert inputs.size() == 1 and not inputs.part
        assert torch.equal(model(*inputs.args), whole)


def attends(a: nn.Module, b: nn.Module, x: Tensor, memory: Tensor) -> Tensor:
    h = a(x) @ a(memory).T
    return b(h.softmax(1) @ a(memory))


def gated(a: nn.Module, b: nn.Module, x: Tensor, memory: Tensor) -> Tensor:
    return x[:, :3] + b(a(memory).mean(0))


@pytest.mark.parametrize("scale", [0.0, 1e-12])
@pytest.mark.parametrize("call", [attends, gated])
def test_outputs_that_hide_what_they_depend_on_prove_nothing(call: Callable, scale: float) -> None:
    """A last layer of zeros, or of numbers that vanish beside others, until it has learned something."""
    model = Model(call)
    with torch.no_grad():
        for p in model.b.parameters():
            p.mul_(scale)
    passes = passes_of(model)
    for _ in range(5):
        model(x(), x(B, 5) * 2)
        assert passes.inputs(WANTED).size() == 1
    model.b = nn.Linear(6, 3)
    for _ in range(20):
        whole = model(x(), x(B, 5) * 2)
        inputs = passes.inputs(WANTED)
        assert inputs.size() == 1 and torch.equal(model(*inputs.args), whole)


def test_a_last_layer_of_zeros_is_no_hindrance_where_all_is_cut() -> None:
    for call, args in (CUT["an unused one"], CUT["one tensor"]):
        model = Model(call)
        nn.init.zeros_(model.b.weight)
        passes = passes_of(model)
        whole = first(model(*args))
        check_part(model, passes.inputs(WANTED), whole)


EDGES = torch.randint(B - 8, (2, 99), generator=torch.Generator().manual_seed(0))
EDGES[0, 0], EDGES[1, 0] = 19, 0  # in every batch of 20 and more
INDICES: dict[str, Callable[[int], Any]] = {
    "neighbours": lambda n: torch.arange(n).roll(1)[:, None],
    "neighbours in lists": lambda n: torch.arange(n).roll(1).tolist(),
    "neighbours in an array": lambda n: torch.arange(n).roll(1).numpy(),
    "edges": lambda n: EDGES.clamp(max=n - 1),
    "a list": lambda n: [0, 5, n - 1],
    "an array": lambda n: np.array([[0, 5, 19]]),
    "from the end": lambda n: torch.tensor([-1, -20]),
    "a list of tensors": lambda n: [torch.tensor(0), torch.tensor(19)],
    "positions in all": lambda n: torch.tensor([0, 5 * n - 1]),
}  # fmt: skip


@pytest.mark.parametrize("name", INDICES)
def test_no_part_is_tried_in_which_an_index_is_out_of_range(name: str) -> None:
    """Which would end the process on a GPU."""

    def call(a: nn.Module, b: nn.Module, x: Tensor, index: Any) -> Tensor:
        index = torch.as_tensor(index)
        size = len(x) if name != "positions in all" else x.numel()
        outside.append(bool((index >= size).any() or (index < -size).any()))
        return mlp(a, b, x) + index.clamp(-size, size - 1).to(x).mean()

    outside = Unseen()
    passes = passes_of(Model(call))
    passes._batches._fatal = True
    for n in (B, 20, B, 40, B, B, B):
        passes.model(x(n), INDICES[name](n))
        for rows in (WANTED, 12):
            assert passes.inputs(rows).size() in (1, n)
    assert not any(outside) and len(outside) >= 7


def test_tokens_and_lengths_are_cut_where_an_index_out_of_range_is_fatal() -> None:
    for numbers in (torch.arange(B * 4).reshape(B, 4) + B, torch.tensor(LENGTHS)[:, None]):
        passes = passes_of(Model(lambda a, b, x, numbers: mlp(a, b, x) + numbers[:, :1]))
        passes._batches._fatal = True
        passes.model(x(), numbers)
        assert passes.inputs(WANTED).size() == WANTED


def test_graphs_of_several_sizes_stay_whole() -> None:
    model = Model(graph)
    passes = passes_of(model)
    for n in (30, B, 40, B):
        whole = model(x(n), x(n, n).softmax(1))
        inputs = passes.inputs(WANTED)
        assert inputs.size() == 1 and torch.equal(model(*inputs.args), whole)


def test_a_failure_in_passing_is_no_verdict() -> None:
    model = Model(mlp)
    passes = passes_of(model)
    whole = model(x())
    with torch.no_grad():
        model.call = lambda *_: (_ for _ in ()).throw(OSError("busy"))
    assert passes.inputs(WANTED).size() == 1
    model.call = mlp
    sizes = [passes.inputs(WANTED).size() for _ in range(3)]
    assert sizes[-1] == WANTED
    check_part(model, passes.inputs(WANTED), whole)


def test_a_loader_s_batches_are_cut_by_the_same_rule() -> None:
    for (call, args, *layers), size in ((CUT["lengths, a list"], WANTED), (WHOLE["a graph"], 1)):
        model = Model(call, *layers)
        passes = IsolatedPasses(model, None, None, GaussianLikelihood(), [(args, 0)], 0)
        assert passes.inputs(WANTED).size() == size


class Watched(nn.Module):
    """Tells ``see`` the sizes of all batches that it is given; its parameter is of no layer."""

    def __init__(self, see: Callable[[int], None]) -> None:
        super().__init__()
        self.weight, self.layer, self.see = nn.Parameter(randn(5, 5).float()), nn.Linear(5, 3), see

    def forward(self, x: Tensor) -> Tensor:
        self.see(len(x))
        return self.layer(torch.tanh(x @ self.weight))


@pytest.mark.parametrize("fisher", ["ggn", "hessian", "antithetic", "rank1"])
@pytest.mark.parametrize("loader", [False, True])
def test_none_never_cuts(fisher: str, loader: bool) -> None:
    """Neither in products with F nor where moments come from several gradients."""
    sizes: list[set[int]] = []
    for size in (None, WANTED):
        seen = Unseen()
        model, likelihood = Watched(seen.append), GaussianLikelihood()
        optimizer = FishLeg(
            model, likelihood=likelihood, fisher=fisher, curvature_batch=size, aux_loader=[x()] if loader else None,
            update_aux_every=10,
        )  # fmt: skip
        for _ in range(2):
            likelihood.nll(torch.zeros(B, 3), model(x())).backward()
            optimizer.step()
        sizes.append(set(seen))
    assert sizes[0] == {B} and {B, WANTED} < sizes[1]


def test_a_part_that_fails_says_how_to_keep_batches_whole() -> None:
    class Picky(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) % 16:
                raise ValueError(f"batch of {len(x)}")
            return super().forward(x)

    model = Picky(5, 3)
    passes = passes_of(model)
    model(x(64))
    assert passes.inputs(16).size() == 16  # from here on it is known
    inputs = passes.inputs(10)
    with pytest.raises(ValueError, match=r"batch of 10\n.*curvature_batch=None"):
        passes.run(inputs, 0, lambda: passes.outputs(inputs))
    whole = Inputs.of(x(60))
    with pytest.raises(ValueError, match=r"^batch of 60$"):
        passes.run(whole, 0, lambda: passes.outputs(whole))


def test_over_how_many_terms_an_own_nll_is_the_mean() -> None:
    likelihood = CategoricalLikelihood()

    def draw(model: nn.Module, x: Any) -> Tensor:
        return likelihood.draw(model(x))

    def nll(model: nn.Module, x: Any, y: Tensor) -> Tensor:
        return likelihood.nll(y, model(x))

    def terms(xs: Any, call: Callable, own: Callable = nll) -> int:
        model = Model(call)
        passes = IsolatedPasses(model, draw, own, None, None, 0)
        model(xs)
        inputs = passes.inputs()
        return passes.run(inputs, 0, lambda: passes.drawn_loss(inputs))[1]

    assert terms(x(), mlp) == B
    assert terms(list(x(B, 3, 5)), CUT["a list of images"][0]) == B
    assert terms(SimpleNamespace(x=x()), lambda a, b, o: mlp(a, b, o.x)) == B
    for steps in (1, 2, 6, 7, B):  # time first: of which the labels' rows may be a multiple
        assert terms(x(steps, B, 5), lambda a, b, x: mlp(a, b, x).mean(0)) == B
        assert terms([x(steps, B, 5), x(3)], lambda a, b, xs: mlp(a, b, xs[0]).sum(0)) == B
    assert terms(x(B, 4, 5), lambda a, b, x: mlp(a, b, x).reshape(-1, 3)) == 4 * B  # each position is labelled

    def weighed(model: nn.Module, x: Any, y: Tensor) -> Tensor:
        return nll(model, x, y)

    weighed.terms = lambda model, x, y: 7 * len(y)
    assert terms(x(), mlp, weighed) == 7 * B
