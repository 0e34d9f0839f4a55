"""Models of every kind: which blocks they get, and that they train."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fishleg_fast
from fishleg_fast import CategoricalLikelihood, FishLeg, GaussianLikelihood


def loss_falls(net: nn.Module, x, y: Tensor, likelihood=None, steps: int = 25, **settings) -> FishLeg:
    """Train on one batch; the loss has to fall and every λ to stay finite."""
    likelihood = likelihood or CategoricalLikelihood()
    optimizer = FishLeg(net, likelihood=likelihood, update_aux_every=2, **settings)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        out = net(*x) if isinstance(x, tuple) else net(x)
        loss = likelihood.nll(y, out)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    told = optimizer.diagnostics()
    assert told["skipped_steps"] == told["skipped_aux_steps"] == 0
    assert all(torch.isfinite(t).all() for b in optimizer.blocks for t in b.structure.fishleg_aux.values())
    owned = [(id(part.param), part.rows and part.rows.start) for b in optimizer.blocks for part in b.parts]
    assert len(owned) == len(set(owned))  # every row of every parameter in one block
    trainable = {id(p) for root in (net, likelihood) for p in root.parameters() if p.requires_grad and p.numel()}
    assert {i for i, _ in owned} == trainable
    return optimizer


def shapes(optimizer: FishLeg) -> dict[str, tuple[int, int]]:
    return {b.name: b.shape for b in optimizer.blocks}


IMAGES = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 3


def convnet(norm: nn.Module, **conv) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, **conv), norm, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)
    )


@pytest.mark.parametrize(
    "conv, n",
    [
        ({}, 37),
        ({"groups": 2}, 19),
        ({"groups": 4, "bias": False}, 9),
        ({"padding": 1, "padding_mode": "circular"}, 37),
        ({"padding": "same", "padding_mode": "reflect"}, 37),
        ({"stride": 2, "dilation": 2, "padding": 2}, 37),
    ],
)
def test_convolutions(conv: dict, n: int) -> None:
    optimizer = loss_falls(convnet(nn.Identity(), **conv), IMAGES, LABELS)
    assert shapes(optimizer)["0"] == (8, n)


@pytest.mark.parametrize("dims", [1, 3])
def test_convolutions_in_other_dimensions(dims: int) -> None:
    torch.manual_seed(0)
    conv = (nn.Conv1d, None, nn.Conv3d)[dims - 1]
    net = nn.Sequential(conv(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(8, 2, *[5] * dims)
    net(x)
    optimizer = loss_falls(net, x, LABELS)
    assert shapes(optimizer)["0"] == (5, 2 * 3**dims + 1)


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False), nn.GroupNorm(2, 8), nn.GroupNorm(2, 8, affine=False)],
    ids=str,
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_norms_and_memory_formats(norm: nn.Module, channels_last: bool) -> None:
    net = convnet(norm)
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    optimizer = loss_falls(net, IMAGES, LABELS)
    assert len(optimizer.blocks) == (3 if list(norm.parameters()) else 2)


def test_an_affine_free_norm_alone_beside_a_layer() -> None:
    net = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7, elementwise_affine=False), nn.RMSNorm(7), nn.Linear(7, 3))
    optimizer = loss_falls(net, torch.randn(8, 5), LABELS)
    assert shapes(optimizer) == {"0": (7, 6), "2": (7, 1), "3": (3, 8)}


class Transformer(nn.Module):
    """A small language model with tied embeddings and a learned position: logits (B, T, V)."""

    def __init__(self, tied: bool = True, kdim: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 8)
        self.position = nn.Parameter(0.1 * torch.randn(5, 8))
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=kdim, vdim=kdim)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 13, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens) + self.position
        z = self.norm(h)
        memory = z if self.attention.kdim == 8 else torch.cat([z, z], -1)
        h = h + self.attention(z, memory, memory, need_weights=False)[0]
        return self.head(h + self.mlp(h))


@pytest.mark.parametrize("tied, kdim", [(True, None), (False, 16)])
@pytest.mark.parametrize("fisher", ["ggn", "hessian"])
def test_transformer(tied: bool, kdim: int | None, fisher: str) -> None:
    torch.manual_seed(0)
    net = Transformer(tied, kdim)
    tokens = torch.randint(13, (6, 5))
    optimizer = loss_falls(net, tokens, (tokens + 1) % 13, CategoricalLikelihood(class_dim=-1), fisher=fisher)
    k = kdim or 8
    wanted = {
        "embedding": (13, 8), "norm": (16, 1), "attention.q": (8, 9), "attention.k": (8, k + 1),
        "attention.v": (8, k + 1), "attention.out_proj": (8, 9), "mlp.0": (16, 9), "mlp.2": (8, 17),
        "position": (40, 1),
    }  # fmt: skip
    assert shapes(optimizer) == wanted | ({} if tied else {"head": (13, 8)})
    assert (net.head.weight is net.embedding.weight) == tied
    assert optimizer.blocks[0].structure.fishleg_aux["R"].shape == (13,)  # no V×V factor
    names = {"q.R", "q.L", "k.R", "k.L", "v.R", "v.L"} if kdim is None else None
    assert names is None or set(net.attention.fishleg_aux) == names


def test_a_shared_layer_is_one_block() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    net = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(6, 3))
    optimizer = loss_falls(net, torch.randn(8, 6), LABELS)
    assert shapes(optimizer) == {"0": (6, 7), "4": (3, 7)}


def test_frozen_layers_and_frozen_halves_of_layers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    net[0].requires_grad_(False)
    net[2].weight.requires_grad_(False)
    net[4].bias.requires_grad_(False)
    before = [net[0].weight.clone(), net[2].weight.clone(), net[4].bias.clone()]
    optimizer = loss_falls(net, torch.randn(8, 5), LABELS)
    assert shapes(optimizer) == {"2": (6, 1), "4": (3, 6)}
    after = [net[0].weight, net[2].weight, net[4].bias]
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))


class Root(nn.Module):
    """A custom root: parameters of its own, nested blocks, a parametrized weight, a recurrent layer, an unused one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))  # no dimensions
        self.nothing = nn.Parameter(torch.zeros(0, 3))
        self.mix = nn.Parameter(torch.eye(6) + 0.1 * torch.randn(6, 6))
        self.inner = nn.ModuleDict({"a": nn.Sequential(nn.Linear(6, 6), nn.ModuleList([nn.Linear(6, 6)])[0])})
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.recurrent = nn.GRU(6, 4, batch_first=True)
        self.bilinear = nn.Bilinear(4, 4, 3)
        self.unused = nn.Linear(3, 3)
        self.register_buffer("shift", torch.ones(6))

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        h = self.normed(self.inner["a"](x @ self.mix * self.scale + self.shift)) * gain
        h = self.recurrent(h[:, None])[0][:, 0]
        return self.bilinear(h, h)


def test_a_custom_root_with_everything_unusual() -> None:
    torch.manual_seed(0)
    net = Root()
    before = net.unused.weight.clone()
    optimizer = FishLeg(net, likelihood=CategoricalLikelihood(), update_aux_every=1)
    x = torch.randn(8, 6)
    first = last = None
    for _ in range(20):
        optimizer.zero_grad()
        last = CategoricalLikelihood().nll(LABELS, net(x, gain=2.0))
        first = first or last.item()
        last.backward()
        optimizer.step()
    assert last.item() < first
    assert torch.equal(net.unused.weight, before)
    names = set(shapes(optimizer))
    assert {"scale", "mix", "inner.a.0", "inner.a.1", "normed.bias", "recurrent.weight_ih_l0", "unused"} <= names
    assert "nothing" not in names and "normed" not in names


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    net = convnet(nn.BatchNorm2d(8)).to(dtype)
    loss_falls(net, IMAGES.to(dtype), LABELS)
    assert all(p.dtype == dtype for p in net.parameters())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(t.dtype == wide for t in net[0].fishleg_aux.values())


def test_pixelwise_targets_and_a_likelihood_with_parameters() -> None:
    torch.manual_seed(0)
    net = nn.Conv2d(4, 3, 3, padding=1)
    loss_falls(net, IMAGES, torch.randint(3, (8, 6, 6)))
    loss_falls(nn.Linear(4, 2), torch.randn(8, 4), torch.randn(8, 2), GaussianLikelihood(learn=True))


def test_outputs_with_logits_and_mapping_inputs() -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Net(nn.Linear):
        def forward(self, *, x: Tensor, mask: Tensor | None = None) -> Output:
            return Output(super().forward(x))

    net, likelihood = Net(5, 3), CategoricalLikelihood()
    batches = [{"x": torch.randn(8, 5), "mask": torch.ones(8)}] * 2
    optimizer = FishLeg(net, likelihood=likelihood, aux_loader=batches, update_aux_every=1)
    for _ in range(3):
        optimizer.zero_grad()
        likelihood.nll(LABELS, net(x=torch.randn(8, 5)).logits).backward()
        optimizer.step()
    assert optimizer.diagnostics()["aux_steps"] == 3


FISH = {
    "FishLinear": ((5, 3), (8, 5)),
    "FishConv2d": ((4, 3, 3), (8, 4, 5, 5)),
    "FishLayerNorm": ((5,), (8, 5)),
    "FishRMSNorm": ((5,), (8, 5)),
    "FishGroupNorm": ((2, 4), (8, 4, 5)),
    "FishBatchNorm1d": ((5,), (8, 5)),
    "FishBatchNorm2d": ((4,), (8, 4, 5, 5)),
    "FishBatchNorm3d": ((4,), (8, 4, 3, 3, 3)),
    "FishEmbedding": ((7, 5), (8, 2)),
    "FishMultiheadAttention": ((4, 2), (8, 3, 4)),
}


@pytest.mark.parametrize("name", FISH)
def test_every_fish_module_computes_what_torchs_does_and_has_a_qv(name: str) -> None:
    args, shape = FISH[name]
    torch.manual_seed(0)
    fish = getattr(fishleg_fast, name)(*args)
    plain = getattr(nn, name.removeprefix("Fish"))(*args)
    plain.load_state_dict(fish.state_dict())
    x = torch.randint(7, shape) if name == "FishEmbedding" else torch.randn(shape)
    inputs = (x, x, x) if name == "FishMultiheadAttention" else (x,)
    got, want = fish(*inputs), plain(*inputs)
    got, want = (got[0], want[0]) if isinstance(got, tuple) else (got, want)
    assert torch.equal(got, want)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = fish

        def forward(self, *args: Tensor) -> Tensor:
            out = self.layer(*args)
            return F.layer_norm(out[0] if isinstance(out, tuple) else out, out[0].shape[-1:])

    net = Whole()
    optimizer = FishLeg(net, likelihood=GaussianLikelihood(), update_aux_every=1)
    GaussianLikelihood().nll(torch.zeros_like(got), net(*inputs)).backward()
    optimizer.step()
    v = tuple(torch.randn_like(p) for p in fish.parameters(recurse=False))
    out = fish.Qv(v)
    assert [x.shape for x in out] == [x.shape for x in v]
    assert sum((a * b).sum() for a, b in zip(v, out, strict=True)) > 0  # positive definite
