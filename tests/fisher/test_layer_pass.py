"""Moments a few layers at a time, and large layers' some samples at a time: the same as of all rows at once."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fishleg_fast import CategoricalLikelihood, FishLeg
from fishleg_fast.backends import reference as steps  # or the ops of another backend, by each_backend
from fishleg_fast.fisher import layer_pass
from fishleg_fast.fisher.layer_pass import Share, _ends
from fishleg_fast.fisher.moments import moments
from fishleg_fast.model.assemble import build_blocks
from fishleg_fast.model.block import Block
from fishleg_fast.passes.inputs import Inputs
from fishleg_fast.passes.isolated import IsolatedPasses
from support.dense import randn, relative

pytestmark = pytest.mark.usefixtures("each_backend")


class Shared(nn.Module):
    """One convolution in three calls: one below another, one beside both, of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        deep = self.conv(F.relu(self.conv(x))) + self.conv(x)
        small = self.conv(F.avg_pool2d(x, 2))
        return self.head(deep.mean((2, 3)) + small.mean((2, 3)))


class Branches(nn.Module):
    """Layers beside each other, one of them unused, one in place activated, one checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3, bias=False), nn.Conv2d(2, 3, 3)
        self.norm, self.last, self.head = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 2, groups=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        x = F.relu(self.a(x), inplace=True) * self.norm(self.b(x))
        return self.head(checkpoint(self.last, x, use_reentrant=False).mean((2, 3)))


def flat(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(1), nn.LazyLinear(3))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "two dimensions": (lambda: flat(nn.Conv2d(2, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 2, 2)), (13, 2, 9, 8)),
    "groups": (lambda: flat(nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="circular")), (7, 4, 5, 6)),
    "one dimension": (lambda: flat(nn.Conv1d(3, 5, 4, dilation=2, bias=False)), (9, 3, 17)),
    "shared": (Shared, (6, 2, 8, 8)),
    "branches": (Branches, (6, 2, 7, 7)),
}


def averaged(model: nn.Module, x: Tensor, structure: str = "kron") -> tuple[list[Block], list[Share]]:
    """The blocks' moving averages after two batches, and what they were made of."""
    passes = IsolatedPasses(model, None, None, CategoricalLikelihood(), [x], 0)
    blocks = build_blocks(model, list(model.parameters()), structure, None)
    shares: list[Share] = []

    def take(share: Share) -> None:
        shares.append(Share(share.blocks, list(share.statistics), share.more))
        steps.average_moments(share.blocks, share.statistics, 0.7, share.more)

    for block in blocks:
        block.allocate(on_device=False)
    for _ in range(2):
        moments(passes, blocks, Inputs.of(x), take)
    return blocks, shares


@pytest.fixture
def small_parts() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_pass, "ENTRIES", 150)
        yield patch


@pytest.mark.parametrize("structure", ["kron", "diagkron", "diagonal"])
@pytest.mark.parametrize("name", MODELS)
def test_parts_make_up_the_whole(name: str, structure: str, small_parts: pytest.MonkeyPatch) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = make(), randn(*shape, dtype=torch.float32)
    model(x)  # what is lazy
    blocks, shares = averaged(model, x, structure)
    assert sum(share.more for share in shares) >= 4
    small_parts.setattr(layer_pass, "ENTRIES", 2**40)
    wanted, whole = averaged(model, x, structure)
    assert not any(share.more for share in whole)
    for got, want in zip(blocks, wanted, strict=True):
        assert got.moments_weight == want.moments_weight
        for moment in want.moments:
            assert relative(got.moments[moment], want.moments[moment]) <= 1e-5, (got.name, moment)


def test_rows_of_a_part_are_few(small_parts: pytest.MonkeyPatch) -> None:
    small_parts.setattr(layer_pass, "ENTRIES", 2000)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 3))
    _, shares = averaged(model, randn(16, 2, 10, 10, dtype=torch.float32))
    for share in shares:
        rows = [s.a.numel() for s in share.statistics if isinstance(s, layer_pass.LayerStatistics)]
        one_sample = max(r // 1 for r in rows)
        assert sum(rows) <= 2000 or (len(rows) == 1 and one_sample <= 8 * 8 * 19 * 2)


def test_a_batch_that_is_not_finite_leaves_the_average_alone(small_parts: pytest.MonkeyPatch) -> None:
    """The last sample's part would come after others had been added."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 3))
    x = randn(9, 2, 8, 8, dtype=torch.float32)
    x[-1, 0, 3, 3] = float("inf")
    blocks, _ = averaged(model, x)
    for block in blocks:
        assert block.moments_weight == 0 and all(t.count_nonzero() == 0 for t in block.moments.values())


def test_ends_are_what_nothing_else_lies_beyond() -> None:
    x = torch.ones(3, requires_grad=True)
    a = x * 2
    b, c = a.exp(), a.sin()
    d = b * c
    loss = (d + x.cos()).sum()
    nodes = {name: t.grad_fn for name, t in {"a": a, "b": b, "c": c, "d": d}.items()}
    found = lambda *names: {n for n in names if nodes[n] in _ends([nodes[m] for m in names])}
    assert found("a", "b", "c", "d") == {"a"} and found("b", "c", "d") == {"b", "c"} and found("d") == {"d"}
    assert _ends([]) == set() and loss.grad_fn is not None


def test_deep_graphs_do_not_exhaust_the_stack() -> None:
    x = torch.ones((), requires_grad=True)
    first = y = x * 1
    for _ in range(5000):
        y = y + 1
    assert _ends([y.grad_fn, first.grad_fn]) == {first.grad_fn}


def test_output_gradients_are_let_go_on_the_way(small_parts: pytest.MonkeyPatch) -> None:
    """While the first layer's are made use of, no other large layer's input and output gradient are there any more."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Conv2d(2, 2, 3, padding=1) for _ in range(5)], nn.Flatten(), nn.Linear(128, 3))
    held: list[int] = []
    use = layer_pass.LayerPass._use

    def counted(self: layer_pass.LayerPass, block: Block, calls: list[layer_pass.Shown]) -> bool:
        left = [c for others in self._calls.values() for c in others if c.e is not None]
        held.append(len(left))
        return use(self, block, calls)

    small_parts.setattr(layer_pass.LayerPass, "_use", counted)
    averaged(model, randn(6, 2, 8, 8, dtype=torch.float32))
    assert held == [0] * 12


def test_autocast_does_not_round_moments(small_parts: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 3))
    optimizer = FishLeg(model, likelihood=CategoricalLikelihood(), backend="reference")
    x = randn(9, 2, 8, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x), torch.arange(9) % 3)
    loss.backward()
    optimizer.step()
    patches = F.unfold(x, 3).mT.reshape(-1, 18)
    rows = torch.cat([patches, torch.ones(len(patches), 1)], dim=1).double()
    moment = optimizer.blocks[0].moments["columns"] / optimizer.blocks[0].moments_weight
    assert relative(moment.double(), rows.T @ rows / len(rows)) <= 1e-2 and moment.dtype == torch.float32


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_diagonal_of_a_grouped_convolution(groups: int) -> None:
    """With one position a sample it is exact: the mean of squares of the samples' gradients."""
    torch.manual_seed(0)
    conv = nn.Conv1d(6, 6, 4, groups=groups).double()
    model, x, terms = nn.Sequential(conv, nn.Flatten()), randn(5, 6, 4), 5
    passes = IsolatedPasses(model, None, None, CategoricalLikelihood(), [x], 0)
    blocks = build_blocks(model, list(model.parameters()), "diagonal", None)
    shares: list[Share] = []
    moments(passes, blocks, Inputs.of(x), shares.append)
    (statistics,) = shares[0].statistics
    assert isinstance(statistics, layer_pass.LayerStatistics) and statistics.terms == terms
    squares = torch.zeros(blocks[0].shape, dtype=torch.float64)
    for sample, e in zip(x, statistics.e, strict=True):
        out = model(sample[None])
        weight, bias = torch.autograd.grad(out, [conv.weight, conv.bias], e[None])
        squares += torch.cat([weight.flatten(1), bias[:, None]], dim=1) ** 2 * terms
    (got,) = [blocks[0].structure.layer_moments(*statistics)]
    assert relative(got["diagonal"], squares) <= 1e-12


class Checkpointed(nn.Module):
    """Blocks of layers that run again in the backward pass, or not; the first has nothing but a layer before it."""

    def __init__(self, on: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.on, self.first, self.head = on, nn.Linear(6, 8), nn.Linear(8, 3)
        make = lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8))
        self.parts = nn.ModuleList(make() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        run = (lambda f, x: checkpoint(f, x, use_reentrant=False)) if self.on else (lambda f, x: f(x))
        x = run(self.first, x)
        for part in self.parts:
            x = x + run(part, x)
        return run(self.head, x)


def test_checkpointed_layers_show_the_same() -> None:
    x = randn(12, 6, dtype=torch.float32)
    (plain, _), (again, shares) = averaged(Checkpointed(False), x), averaged(Checkpointed(True), x)
    assert sum(len(share.blocks) for share in shares) == 2 * len(again)
    assert all(isinstance(s, layer_pass.LayerStatistics) for share in shares for s in share.statistics)
    for got, want in zip(again, plain, strict=True):
        for name, moment in want.moments.items():
            assert relative(got.moments[name], moment) <= 1e-6, (got.name, name)


def test_checkpointed_layers_keep_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the forward pass none is held; while a layer is made use of, those of its own part at most."""
    held: list[int] = []
    inputs = lambda layers: sum(c.x is not None for calls in layers._calls.values() for c in calls)
    backward, use = layer_pass.LayerPass._backward, layer_pass.LayerPass._use

    def before(self: layer_pass.LayerPass, *args: object) -> None:
        held.append(inputs(self))
        backward(self, *args)  # type: ignore[arg-type]

    def during(self: layer_pass.LayerPass, block: Block, calls: list[layer_pass.Shown]) -> bool:
        held.append(inputs(self))
        return use(self, block, calls)

    monkeypatch.setattr(layer_pass.LayerPass, "_backward", before)
    monkeypatch.setattr(layer_pass.LayerPass, "_use", during)
    averaged(Checkpointed(True), randn(12, 6, dtype=torch.float32))
    assert held[0] == 0 and 1 < len(held) and max(held) <= 3


def test_a_layer_shared_by_checkpointed_parts_has_its_gradient_taken() -> None:
    """Which of its calls runs again cannot be told."""

    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = checkpoint(lambda x: torch.tanh(self.a(x)), x, use_reentrant=False)
            return self.head(x)

    torch.manual_seed(0)
    blocks, shares = averaged(Shares(), randn(12, 6, dtype=torch.float32))
    kinds = {b.name: type(s) for share in shares for b, s in zip(share.blocks, share.statistics, strict=True)}
    assert kinds == {"a": dict, "head": layer_pass.LayerStatistics}
    assert all(b.moments_weight > 0 for b in blocks)


@pytest.mark.parametrize("model", ["shared", "branches"])
def test_nothing_of_a_pass_outlives_it(model: str) -> None:
    """Autograd's nodes hold their hooks where the garbage collector does not see it."""
    net = {"shared": Shared, "branches": Branches}[model]()
    optimizer = FishLeg(net, likelihood=CategoricalLikelihood(), anchor_every=1)
    x, y = torch.randn(12, 2, 9, 8), torch.arange(12) % 3
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.likelihood.nll(y, net(x)).backward()
        optimizer.step()
    gc.collect()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, (layer_pass.LayerPass, layer_pass.Call))]
