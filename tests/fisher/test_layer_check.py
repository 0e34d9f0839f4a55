"""What layers show is taken for their factors only where it makes their parameters' gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fishleg_fast import CategoricalLikelihood, FishLeg
from fishleg_fast.algebra.structures.base import LayerStatistics
from fishleg_fast.fisher.layer_pass import Share
from fishleg_fast.fisher.moments import moments
from fishleg_fast.model.assemble import build_blocks
from fishleg_fast.model.block import Block
from fishleg_fast.passes.inputs import Inputs
from fishleg_fast.passes.isolated import IsolatedPasses
from support.dense import randn
from support.unseen import Unseen

CLASSES_LAST = CategoricalLikelihood(class_dim=-1)


class Net(nn.Module):
    """Named layers, and what is done with them."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.layers, self._run = nn.ModuleDict(layers), forward

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, *self.layers.values())


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.05, self.bias)


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 4 * F.linear(F.normalize(x), F.normalize(self.weight))


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / (w.std((1, 2, 3), keepdim=True) + 1e-5), self.bias, groups=self.groups)


class Halved(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.weight / 2)


def hooked(layer: nn.Module, prepend: bool = False) -> nn.Module:
    layer.register_forward_hook(lambda module, args, output: output * 0.2, prepend=prepend)
    return layer


def rooted(net: nn.Module) -> nn.Module:
    net.register_forward_hook(lambda module, args, kwargs, output: output * 0.2, with_kwargs=True)
    return net


def alone(layer: nn.Module) -> Net:
    return Net(lambda x, a: a(x), a=layer)


def in_sequence(**layers: nn.Module) -> Net:
    def forward(x: Tensor, *each: nn.Module) -> Tensor:
        for layer in each:
            x = torch.tanh(layer(x))
        return x

    return Net(forward, **layers)


def image_net(*convs: nn.Module) -> Net:
    layers = {f"c{k}": conv for k, conv in enumerate(convs)}
    return Net(
        lambda x, *each: each[-1](nn.Sequential(*each[:-1])(x).flatten(1)), **layers, o=nn.LazyLinear(3, bias=False)
    )


VECTORS, IMAGES = randn(32, 6).float(), randn(32, 2, 4, 4).float()
WORDS = torch.randint(7, (8, 4), generator=torch.Generator().manual_seed(0))
linear = lambda m, n: nn.Linear(m, n, bias=False)
WRONG: dict[str, tuple[Callable[[], nn.Module], Tensor, set[str]]] = {  # the blocks that do not show their gradient
    "scaled weight": (lambda: alone(Scaled(6, 3)), VECTORS, {"a"}),
    "cosine": (lambda: alone(Cosine(6, 3, bias=False)), VECTORS, {"a"}),
    "below another": (lambda: in_sequence(a=Scaled(6, 8), b=nn.Linear(8, 3)), VECTORS, {"a"}),
    "standardized": (lambda: image_net(Standardized(2, 4, 3, bias=False)), IMAGES, {"c0"}),
    "standardized, groups": (lambda: image_net(Standardized(2, 4, 3, groups=2, bias=False)), IMAGES, {"c0"}),
    "embedding": (lambda: Net(lambda t, e, h: h(e(t)), e=Halved(7, 8), h=linear(8, 7)), WORDS, {"e"}),
    "tied by function": (
        lambda: Net(lambda t, e, l: F.linear(torch.tanh(l(e(t))), e.weight), e=nn.Embedding(7, 8), l=linear(8, 8)),
        WORDS,
        {"e"},
    ),
    "transposed": (
        lambda: Net(lambda x, a, o: o(F.linear(a(x).relu(), 4 * a.weight.T)), a=linear(6, 4), o=linear(6, 3)),
        VECTORS,
        {"a"},
    ),
    "norm's weight": (
        lambda: Net(lambda x, n, o: o(n(x) * (1 + n.weight)), n=nn.LayerNorm(6), o=linear(6, 3)),
        VECTORS,
        {"n"},
    ),
    "hook": (lambda: alone(hooked(linear(6, 3))), VECTORS, set()),
    "hook in front": (lambda: alone(hooked(linear(6, 3), prepend=True)), VECTORS, set()),
    "hook of the model": (lambda: rooted(alone(linear(6, 3))), VECTORS, set()),
    "hook of an embedding": (
        lambda: Net(lambda t, e, h: h(e(t)), e=hooked(nn.Embedding(7, 8)), h=linear(8, 7)),
        WORDS,
        set(),
    ),
}


def true_traces(net: nn.Module, x: Tensor) -> dict[str, float]:
    """Σ over labels of their probability times |g|², g a position's gradient, averaged over positions; by layer."""
    log_p = F.log_softmax(net(x), -1).flatten(0, -2)
    params = list(net.named_parameters())
    traces = dict.fromkeys((name.split(".")[1] for name, _ in params), 0.0)
    for row in log_p:
        for c, p in enumerate(row.detach().exp()):
            grads = torch.autograd.grad(row[c], [p for _, p in params], retain_graph=True, allow_unused=True)
            for (name, _), g in zip(params, grads, strict=True):
                traces[name.split(".")[1]] += 0.0 if g is None else float(p * g.square().sum()) / len(log_p)
    return traces


def name_of(block: Block) -> str:
    return block.name.split(".")[1]


@pytest.mark.parametrize("kind", WRONG)
def test_factors_are_of_the_gradient(kind: str) -> None:
    """Their trace is that of the exact Fisher matrix, up to what a product of two factors can tell.

    Of gradients each anchoring adds |G| to the trace of either factor, so that their product comes to E[|G|]² in the
    place of E[|G|²]: less by at most 2/π, if G is normal.
    """
    torch.manual_seed(0)
    make, x, wrong = WRONG[kind]
    net = make()
    net(x)
    net = net.double()
    optimizer = FishLeg(net, likelihood=CLASSES_LAST, lr=0.0, anchor_every=1, update_aux_every=0, anchor_decay=0.99)
    net(x if x.dtype == torch.long else x.double())
    x = x if x.dtype == torch.long else x.double()
    for _ in range(80):
        optimizer.zero_grad()
        CLASSES_LAST.nll(torch.randint(3, x.shape[: 2 if x.dtype == torch.long else 1]), net(x)).backward()
        optimizer.step()
    assert {name_of(b) for b in optimizer.blocks if not b.layer_agrees} == wrong
    found = {name_of(b): float(b.mean_eigenvalue()) * b.momentum.numel() for b in optimizer.blocks}
    for name, trace in true_traces(net, x).items():
        assert 0.9 * 2 / torch.pi < found[name] / trace < 1.25, (name, found[name], trace)


def transformer(t: Tensor, e: nn.Module, n: nn.Module, a: nn.Module, o: nn.Module) -> Tensor:
    h = n(e(t))
    return o(h + checkpoint(a, h, use_reentrant=False) + a(2 * h))  # a layer called twice


RIGHT: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (lambda: in_sequence(a=nn.Linear(6, 300), b=nn.Linear(300, 5), c=nn.Linear(5, 3)), VECTORS),
    "one sample": (lambda: in_sequence(a=nn.Linear(6, 5), c=nn.Linear(5, 3)), VECTORS[:1]),
    "convolutions": (
        lambda: image_net(nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 6, 3, groups=2)),
        IMAGES,
    ),
    "norms": (
        lambda: image_net(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.GroupNorm(2, 4),
            nn.Dropout(0.5),
            nn.InstanceNorm2d(4, affine=True),
        ),
        IMAGES,
    ),
    "transformer": (
        lambda: Net(
            transformer, e=nn.Embedding(7, 8, padding_idx=0), n=nn.LayerNorm(8), a=nn.Linear(8, 8), o=nn.Linear(8, 7)
        ),
        WORDS,
    ),
    "root mean squares": (lambda: Net(lambda x, n, o: o(n(x)), n=nn.RMSNorm(6), o=nn.Linear(6, 3)), VECTORS),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("kind", RIGHT)
def test_plain_layers_agree(kind: str, precision: str, frozen: bool) -> None:
    """Also where some of their parameters are frozen once there are blocks."""
    torch.manual_seed(0)
    make, x = RIGHT[kind]
    net = make()
    net(x)
    dtype = torch.float32 if precision == "autocast" else getattr(torch, precision)
    net, x = net.to(dtype), x if x.dtype == torch.long else x.to(dtype)
    blocks = build_blocks(net, list(net.parameters()), "kron", None)
    for name, p in net.named_parameters():
        p.requires_grad_(not (frozen and name.endswith(("a.bias", "c0.weight", "c1.bias", "n.weight"))))
    passes = IsolatedPasses(net, None, None, CLASSES_LAST, [x], 0)
    inputs = Inputs.of(x)
    inputs.autocast = torch.bfloat16 if precision == "autocast" else None
    moments(passes, [b for b in blocks if any(p.requires_grad for p in b.params)], inputs, lambda share: None)
    assert not [b.name for b in blocks if b.layer_agrees is False]
    assert any(b.layer_agrees for b in blocks)


class Changing(nn.Linear):
    """Plain until it is told otherwise, or evaluates."""

    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.scale == 1 and self.training else F.linear(x, self.weight * 3, self.bias)


@pytest.mark.parametrize("how", ["mode", "later", "new block"])
def test_what_changes_is_seen(how: str) -> None:
    net = in_sequence(a=Changing(6, 8), b=Changing(8, 3))
    a, b = net.layers.values()
    blocks = build_blocks(net, list(net.parameters()), "kron", None)
    passes = IsolatedPasses(net, None, None, CLASSES_LAST, [VECTORS], 0)
    calls = Unseen()
    a.register_forward_hook(lambda *_: calls.append(1))

    def anchor(times: int) -> None:
        for _ in range(times):
            shares: list[Share] = []
            moments(passes, blocks, Inputs.of(VECTORS), shares.append)
            shown = {
                id(b)
                for s in shares
                for b, x in zip(s.blocks, s.statistics, strict=True)
                if isinstance(x, LayerStatistics)
            }
            assert {id(b) for b in blocks if b.layer_agrees} == shown

    anchor(6)
    assert [x.layer_agrees for x in blocks] == [True, True] and len(calls) == 6 + 4  # the first three, and the fourth
    if how == "mode":
        b.eval()
        anchor(1)
        assert [x.layer_agrees for x in blocks] == [True, False]
        b.train()
        anchor(1)
        assert [x.layer_agrees for x in blocks] == [True, True]
    elif how == "later":
        a.scale = 2.0
        anchor(2)
        assert [x.layer_agrees for x in blocks] == [False, True]
    else:
        b.scale = 2.0
        blocks[1] = build_blocks(net, list(b.parameters()), "kron", None)[0]
        anchor(1)
        assert [x.layer_agrees for x in blocks] == [True, False]


@pytest.mark.parametrize("kind", [kind for kind, (_, _, wrong) in WRONG.items() if wrong])
def test_factors_from_training(kind: str) -> None:
    """Where a layer does not show it they are of the user's gradient itself."""
    torch.manual_seed(0)
    make, x, wrong = WRONG[kind]
    net = make()
    net(x)
    optimizer = FishLeg(net, likelihood=CLASSES_LAST, update_aux_every=0, anchor_from="training", anchor_decay=0.0)
    CLASSES_LAST.nll(torch.randint(3, x.shape[: 2 if x.dtype == torch.long else 1]), net(x)).backward()
    optimizer.step()
    for block in optimizer.blocks:
        of_gradient = block.structure.gradient_moments([block.matrix([p.grad for p in block.params])])
        found = {k: t / block.moments_weight for k, t in block.moments.items()}
        same = all(torch.allclose(found[k], of_gradient[k], rtol=1e-3) for k in found)
        assert same == (name_of(block) in wrong), block.name


class Fickle(nn.Linear):
    """Plain on some batches."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * (3 if x[0, 0] > 0 else 1), self.bias)


@pytest.mark.parametrize("anchor_from", ["drawn", "training"])
def test_a_resumed_run_keeps_what_was_found(anchor_from: str) -> None:
    def new() -> tuple[nn.Module, FishLeg]:
        torch.manual_seed(1)
        net = in_sequence(a=Fickle(6, 8), b=nn.Linear(8, 3))
        return net, FishLeg(net, likelihood=CLASSES_LAST, anchor_every=1, anchor_from=anchor_from)

    def train(net: nn.Module, optimizer: FishLeg, steps: range) -> None:
        for k in steps:
            x = torch.randn(32, 6, generator=torch.Generator().manual_seed(k))
            x[0, 0] = 1 if k % 4 == 3 else -1
            optimizer.zero_grad()
            CLASSES_LAST.nll(torch.arange(32) % 3, net(x)).backward()
            optimizer.step()

    net, optimizer = new()
    saved, found = [], set()
    for k in range(12):
        saved.append(copy.deepcopy((net.state_dict(), optimizer.state_dict())))
        train(net, optimizer, range(k, k + 1))
        found.add(optimizer.blocks[0].layer_agrees)
    assert found == {True, False}
    for k, (weights, state) in enumerate(saved):
        other, resumed = new()
        other.load_state_dict(weights)
        resumed.load_state_dict(state)
        train(other, resumed, range(k, 12))
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True)), k
