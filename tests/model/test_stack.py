"""Equal blocks are stepped together: as each by itself, whatever their structure, layout, dtype and groups."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fishleg_fast import CategoricalLikelihood, FishLeg, GaussianLikelihood
from fishleg_fast.algebra import stacks
from fishleg_fast.algebra.structures.kron import Kron
from fishleg_fast.algebra.structures.sumkron import SumKron
from fishleg_fast.backends import reference
from fishleg_fast.model.stack import stacks_of
from support.dense import relative

EXACT = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 0.05}  # of a few steps, which carry rounding on


class Sum(nn.Module):
    """Layers side by side, all of them equal, so that no rounding is carried from one to the next."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return sum(layer(x).flatten(1).mean(1, keepdim=True) for layer in self.layers)


def linears(*sizes: int, bias: bool = True, count: int = 3) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(count):
            for a, b in itertools.pairwise(sizes):
                layers += [nn.Linear(a, b, bias=bias), nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    return build


def attention() -> nn.Module:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attentions = nn.ModuleList([nn.MultiheadAttention(6, 2, batch_first=True) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            for attention in self.attentions:
                x = x + attention(x, x, x, need_weights=False)[0]
            return x

    return Attend()


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (linears(5, 7, 5), (9, 5)),
    "without bias": (linears(4, 4, bias=False, count=4), (9, 4)),
    "of one input": (lambda: Sum([nn.Linear(1, 3) for _ in range(3)]), (9, 1)),
    "of one output": (lambda: Sum([nn.Linear(3, 1) for _ in range(3)]), (9, 3)),
    "of one entry": (lambda: Sum([nn.Linear(1, 1, bias=False) for _ in range(3)]), (9, 1)),
    "convolutions": (lambda: nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)]), (4, 3, 5, 5)),
    "grouped": (lambda: nn.Sequential(*[nn.Conv1d(4, 4, 2, groups=2, padding=1) for _ in range(2)]), (4, 4, 6)),
    "norms": (lambda: nn.Sequential(nn.Linear(5, 5), *[nn.LayerNorm(5) for _ in range(3)]), (9, 5)),
    "attention": (attention, (3, 4, 6)),
}


def train(build: Callable, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, steps: int = 7, **given: Any):
    """All of λ and of the parameters after a few steps, with updates of λ and anchoring, from one seed."""
    torch.manual_seed(0)
    net = build().to(dtype)
    if "params" in given:
        given["params"] = given["params"](net)
    likelihood = GaussianLikelihood()
    settings = {"lr": 0.02, "update_aux_every": 2, "anchor_every": 3, "thin_gradients": False, **given}
    optimizer = FishLeg(net, likelihood=likelihood, backend="reference", **settings)
    batches = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(shape, generator=batches, dtype=torch.float64).to(dtype)
        optimizer.zero_grad()
        out = net(x)
        y = torch.randn(out.shape, generator=batches, dtype=torch.float64).to(dtype)
        likelihood.nll(y, out).backward()
        optimizer.step()
    assert optimizer.diagnostics()["skipped_steps"] == optimizer.diagnostics()["skipped_aux_steps"] == 0
    aux = [t for b in optimizer.blocks for t in (*b.structure.fishleg_aux.values(), b.momentum)]
    return [t.detach().double() for t in (*aux, *net.parameters())], optimizer


def differ(found: list[Tensor], want: list[Tensor]) -> float:
    return max(relative(a, b) for a, b in zip(found, want, strict=True))


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "ENTRIES", 0)


def check(monkeypatch: pytest.MonkeyPatch, build: Callable, shape: tuple[int, ...], **given: Any) -> None:
    together, optimizer = train(build, shape, **given)
    assert any(len(stack.blocks) > 1 for stack in stacks_of(optimizer.blocks))
    one_by_one(monkeypatch)
    alone, optimizer = train(build, shape, **given)
    assert all(len(stack.blocks) == 1 for stack in stacks_of(optimizer.blocks))
    assert differ(together, alone) <= EXACT[given.get("dtype", torch.float64)]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, capturable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, *MODELS[name], capturable=capturable)


STRUCTURES = {
    "sumkron": {"structure": "sumkron"},
    "three terms": {"structure": partial(SumKron, terms=3)},
    "diagkron": {"structure": "diagkron"},
    "scaled": {"structure": partial(Kron, scale=True)},
    "diagonal": {"structure": "diagonal"},
    "blocks of 3": {"max_factor_size": 3},
    "blocks of 1": {"max_factor_size": 1},
    "a diagonal factor": {"structure": lambda m, n, **rest: Kron(m, n, **{**rest, "diagonal": ("R",)})},
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, *MODELS["linear"], **STRUCTURES[name])


OPTIONS: dict[str, dict[str, Any]] = {
    "rms": {"normalize": "rms", "weight_decay": 0.1},
    "spectral": {"normalize": "spectral"},
    "spectral after": {"normalize": "spectral", "momentum": "after"},
    "trust": {"normalize": "trust"},
    "trust after": {"normalize": "trust", "momentum": "after", "weight_decay": 0.1},
    "as computed": {"normalize": None, "lr": 1e-4},
    "without nesterov": {"nesterov": False, "beta": 0.0},
    "preconditioned": {"precondition_aux": True},
    "without scale": {"learn_scale": False},
    "momentum for u": {"u_sampling": "momentum"},
    "sgd": {"init": "sgd", "anchor_every": 0},
    "absolute": {"damping_scale": "absolute"},
    "hessian": {"fisher": "hessian"},
    "training": {"anchor_from": "training"},
    "a rate as a tensor": {"lr": torch.tensor(0.02)},
    "maximize": {"maximize": True, "lr": 1e-3},
}


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, capturable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, *MODELS["linear"], capturable=capturable, **OPTIONS[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, *MODELS["linear"], dtype=dtype, steps=4, capturable=True)


def test_groups_have_their_own_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    def params(net: nn.Module) -> list[dict]:
        given = list(net.parameters())
        return [
            {"params": given[:4], "lr": 0.01, "beta": 0.5},
            {"params": given[4:7], "weight_decay": 0.3},  # a weight and not its bias
            {"params": given[7:]},
        ]

    check(monkeypatch, *MODELS["linear"], params=params)


def test_frozen_parameters_and_layers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> nn.Module:
        net = linears(4, 4, count=5)()
        net[2].bias.requires_grad_(False)
        net[4].requires_grad_(False)
        return net

    check(monkeypatch, build, (9, 4))


def gradients(optimizer: FishLeg, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in optimizer.model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)


@pytest.fixture
def trained() -> FishLeg:
    _, optimizer = train(linears(4, 4, count=4), (9, 4), anchor_every=0, update_aux_every=0)
    return optimizer


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_gradient_among_equal_blocks_stops_all(bad: float, capturable: bool) -> None:
    state, optimizer = train(linears(4, 4, count=4), (9, 4), anchor_every=0, update_aux_every=0, capturable=capturable)
    gradients(optimizer, 3)
    optimizer.blocks[2].params[1].grad[1] = bad
    before = [p.detach().clone() for p in optimizer.model.parameters()] + [b.momentum.clone() for b in optimizer.blocks]
    optimizer.step()
    after = [*optimizer.model.parameters(), *(b.momentum for b in optimizer.blocks)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert optimizer.diagnostics()["skipped_steps"] == 1 and state


def test_one_zero_gradient_among_equal_blocks_stops_that_one(trained: FishLeg) -> None:
    gradients(trained, 3)
    for p in trained.blocks[1].params:
        p.grad.zero_()
    before = [[p.detach().clone() for p in b.params] for b in trained.blocks]
    trained.step()
    moved = [
        any(not torch.equal(a, p) for a, p in zip(was, b.params, strict=True))
        for was, b in zip(before, trained.blocks, strict=True)
    ]
    assert moved == [True, False, True, True]


def test_a_block_without_a_gradient_is_left_out(trained: FishLeg) -> None:
    gradients(trained, 3)
    for p in trained.blocks[1].params:
        p.grad = None
    trained.blocks[3].params[1].grad = None
    before, bias = trained.blocks[1].momentum.clone(), trained.blocks[3].params[1].detach().clone()
    weight = trained.blocks[3].params[0].detach().clone()
    trained.step()
    assert torch.equal(before, trained.blocks[1].momentum) and torch.equal(bias, trained.blocks[3].params[1])
    assert not torch.equal(weight, trained.blocks[3].params[0])


def anchored(spoil: Callable[[dict[str, Tensor]], None]) -> tuple[FishLeg, list[Tensor]]:
    """Moments of which the second block's were spoilt, and what R was."""
    _, optimizer = train(linears(4, 4, count=4), (9, 4), steps=1, update_aux_every=0)
    spoil(optimizer.blocks[1].moments)
    return optimizer, [b.structure.fishleg_aux["R"].clone() for b in optimizer.blocks]


def test_moments_that_are_not_finite_spoil_one_block_alone() -> None:
    optimizer, before = anchored(lambda moments: moments["rows"].fill_(float("nan")))
    for block in optimizer.blocks:
        block.moments["columns"].mul_(2)
    with pytest.raises(torch.linalg.LinAlgError, match="moments should be finite"):
        reference.start_kfac(optimizer.blocks, 0.1)
    same = [torch.equal(a, b.structure.fishleg_aux["R"]) for a, b in zip(before, optimizer.blocks, strict=True)]
    assert same == [False, True, False, False]


def test_rounding_is_repaired_for_the_block_that_it_spoils() -> None:
    """Of rank one, to which float32 cannot add so small a damping: as the block alone, by way of float64."""
    torch.manual_seed(0)
    net = linears(30, 30, count=3, bias=False)().float()
    optimizer = FishLeg(net, likelihood=GaussianLikelihood(), backend="reference", lr=0.1)
    for block in optimizer.blocks:
        for name, t in block.moments.items():
            x = torch.randn(30, 100)
            t.copy_(x @ x.T / 100 if name else t)
        block.moments_weight.fill_(1)
    x = torch.randn(30, 1).sign()
    optimizer.blocks[1].moments["rows"].copy_(x @ x.T)
    alone = copy.deepcopy(optimizer.blocks)
    reference.start_kfac(optimizer.blocks, 1e-16)
    for block in alone:
        reference.start_kfac([block], 1e-16)
    for block, want in zip(optimizer.blocks, alone, strict=True):
        for name, t in block.structure.fishleg_aux.items():
            assert torch.isfinite(t).all() and relative(t, want.structure.fishleg_aux[name]) <= 1e-3


def test_statistics_that_are_not_finite_are_left_out_of_that_blocks_average() -> None:
    optimizer, _ = anchored(lambda moments: None)
    blocks = optimizer.blocks
    news = [{name: torch.ones_like(t) for name, t in b.moments.items()} for b in blocks]
    news[2]["columns"][0, 0] = float("inf")
    before = [{name: t.clone() for name, t in b.moments.items()} for b in blocks]
    weights = [float(b.moments_weight) for b in blocks]
    done = reference.average_moments(blocks, news, 0.9)
    assert done == [blocks[k] for k in (0, 1, 3)]
    for k, block in enumerate(blocks):
        for name, t in block.moments.items():
            assert torch.allclose(t, before[k][name] if k == 2 else 0.9 * before[k][name] + 0.1)
        assert float(block.moments_weight) == pytest.approx(weights[k] if k == 2 else 0.9 * weights[k] + 0.1)


def test_cached_products_keep_their_memory() -> None:
    """What a CUDA graph reads is where it was after λ has changed, and of today's λ, whichever blocks step together."""
    _, optimizer = train(linears(4, 4, count=4), (9, 4))
    reference.refresh(optimizer.blocks)
    places = [b.structure.cache["P"].data_ptr() for b in optimizer.blocks]
    for blocks in (optimizer.blocks, optimizer.blocks[1:3], optimizer.blocks[:1], optimizer.blocks[::-1]):
        for block in blocks:
            block.structure.fishleg_aux["R"].mul_(1.1)
        reference.refresh(blocks)
        for block, place in zip(optimizer.blocks, places, strict=True):
            R = block.structure.fishleg_aux["R"]
            assert relative(block.structure.cache["P"], R.T @ R) <= 1e-12
            assert block.structure.cache["P"].data_ptr() == place


STEPS: list[dict[str, Any]] = [
    {},
    *({"normalize": rule} for rule in ("rms", "spectral", "trust", None)),
    {"momentum": "after"},
    *({"structure": name} for name in ("sumkron", "diagkron", "diagonal")),
]


@pytest.mark.parametrize("given", STEPS, ids=str)
def test_an_ordinary_step_reads_nothing_from_the_device(given: dict[str, Any]) -> None:
    """On torch's "meta" device nothing can be read: a step that waits for a number raises."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(3, 8), *[nn.Linear(8, 8) for _ in range(3)], nn.LayerNorm(8), nn.Embedding(5, 8))
        net.append(nn.Conv2d(3, 4, 3))
    optimizer = FishLeg(
        net, likelihood=CategoricalLikelihood(), backend="reference", init="sgd", anchor_every=0, update_aux_every=0,
        **given,
    )  # fmt: skip
    for _ in range(3):
        for p in net.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step()
    assert optimizer.blocks[0].step.device.type == "meta"
    with pytest.raises(RuntimeError, match="meta"):
        bool(optimizer.blocks[0].step)
