"""The Kronecker factors that a pass sees in a layer, against the exact Fisher matrix and the layer's own output."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from fishleg_fast.algebra.structures.base import LayerStatistics
from fishleg_fast.fisher.layer_pass import Share
from fishleg_fast.fisher.moments import moments as statistics_of
from fishleg_fast.likelihoods import BernoulliLikelihood, CategoricalLikelihood, GaussianLikelihood, Likelihood
from fishleg_fast.model.assemble import build_blocks
from fishleg_fast.model.block import Block
from fishleg_fast.model.layers import layer_of
from fishleg_fast.passes.inputs import Inputs
from fishleg_fast.passes.isolated import IsolatedPasses
from support.dense import explicit_fisher, full, randn, relative
from support.unseen import Unseen


class Given(GaussianLikelihood):
    """A Gaussian whose "drawn" labels are given, so that factors can be computed by hand."""

    labels: Tensor

    def draw(self, outputs: Tensor) -> Tensor:
        return self.labels[: len(outputs)]


def blocks_of(model: nn.Module, structure: str = "kron") -> list[Block]:
    return build_blocks(model, list(model.parameters()), structure, None)


def second_moments(passes: IsolatedPasses, blocks: list[Block], inputs: Inputs) -> list[dict[str, Tensor]]:
    """What a pass shows of each block, as moments."""
    shares: list[Share] = []
    statistics_of(passes, blocks, inputs, shares.append)
    found: dict[int, dict[str, Tensor]] = {}
    for share in shares:
        for b, s in zip(share.blocks, share.statistics, strict=True):
            new = b.structure.layer_moments(*s) if isinstance(s, LayerStatistics) else s
            assert share.more == (id(b) in found)
            found[id(b)] = {k: t + found[id(b)][k] for k, t in new.items()} if share.more else new
    return [found.get(id(b), {}) for b in blocks]


def moments(model: nn.Module, likelihood: Likelihood, x: Tensor, seed: int = 0, structure: str = "kron") -> list:
    return second_moments(
        IsolatedPasses(model, None, None, likelihood, [x], seed), blocks_of(model, structure), Inputs.of(x)
    )


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)


def block_order(model: nn.Linear, F: Tensor) -> Tensor:
    """F over (weight, bias), each flattened -> F over vec of the block (out, in + 1)."""
    m, n = model.weight.shape
    order = torch.cat([torch.arange(m * n).reshape(m, n), m * n + torch.arange(m)[:, None]], dim=1).reshape(-1)
    return F[order[:, None], order]


@pytest.mark.parametrize("batch", [1, 6])
def test_linear_layer_of_given_labels(batch: int) -> None:
    """rows = (1/N) Σ δδᵀ with δ each sample's own output gradient, columns = (1/N) Σ aaᵀ."""
    model, x = nn.Linear(3, 2).double(), randn(batch, 3)
    likelihood = Given(0.5).double()
    likelihood.labels = randn(batch, 2, seed=1)
    (got,) = moments(model, likelihood, x)
    delta = (model(x) - likelihood.labels).detach() / likelihood.sigma**2
    assert relative(got["rows"], delta.T @ delta / batch) <= 1e-12
    assert relative(got["columns"], with_ones(x).T @ with_ones(x) / batch) <= 1e-12


@pytest.mark.parametrize(
    ("kind", "likelihood", "batch"),
    [
        ("gaussian", GaussianLikelihood(0.5), 6),
        ("bernoulli", BernoulliLikelihood(), 1),
        ("categorical", CategoricalLikelihood(), 1),
    ],
)
def test_linear_layer_is_exact_in_expectation(kind: str, likelihood: Likelihood, batch: int) -> None:
    """E[rows] ⊗ columns is the Fisher matrix: of one sample, and of any batch where H_out is constant (Gaussian)."""
    model, x = nn.Linear(3, 2).double(), randn(batch, 3)
    passes, blocks, inputs = IsolatedPasses(model, None, None, likelihood, [x], 0), blocks_of(model), Inputs.of(x)
    draws = [second_moments(passes, blocks, inputs)[0] for _ in range(400)]
    rows = torch.stack([d["rows"] for d in draws])
    want = block_order(model, explicit_fisher(model, x, kind, 0.5))
    error = torch.kron(rows.std(0) / math.sqrt(len(draws)), draws[0]["columns"].abs())
    assert ((torch.kron(rows.mean(0), draws[0]["columns"]) - want).abs() <= 5 * error + 1e-7).all()
    assert error.norm() <= 0.15 * want.norm()


CONVS = {
    "plain": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 6, 5)),
    "padded": (lambda: nn.Conv2d(2, 3, (3, 2), padding=(2, 1), stride=(1, 2)), (2, 2, 5, 6)),
    "same": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same"), (2, 2, 5, 6)),
    "valid": (lambda: nn.Conv2d(2, 3, 2, padding="valid", dilation=2), (2, 2, 5, 6)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 2, 5, 6)),
    "reflect": (lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect"), (2, 2, 5, 6)),
    "replicate": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate", bias=False), (2, 2, 5, 6)),
    "one image": (lambda: nn.Conv2d(2, 3, 3), (2, 5, 6)),
    "one dimension": (lambda: nn.Conv1d(2, 3, 3, padding=1, stride=2), (2, 2, 7)),
    "1x1": (lambda: nn.Conv2d(2, 3, 1), (2, 2, 3, 3)),
}


@pytest.mark.parametrize("name", CONVS)
def test_patches_reproduce_a_convolution(name: str) -> None:
    make, shape = CONVS[name]
    conv, x = make().double(), randn(*shape)
    patches = layer_of(conv).inputs(conv, x)
    weight, y = conv.weight.reshape(conv.out_channels, -1), conv(x)
    got = patches @ weight.T + (0 if conv.bias is None else conv.bias)
    assert relative(got.detach(), layer_of(conv).output_gradients(conv, y).detach()) <= 1e-12
    positions = y[None] if y.ndim == 3 and x.ndim == 3 and isinstance(conv, nn.Conv2d) else y
    assert relative(got.detach(), positions.movedim(1, -1).reshape(-1, conv.out_channels).detach()) <= 1e-12


def test_patches_of_a_grouped_convolution() -> None:
    conv, x = nn.Conv2d(6, 9, 3, groups=3, padding=1, bias=False).double(), randn(2, 6, 5, 4)
    patches = layer_of(conv).inputs(conv, x).reshape(3, 2, 20, 18)  # groups, images, positions, inputs of a group
    weight = conv.weight.reshape(3, 3, 18)
    got = torch.einsum("gbpk,gok->bgop", patches, weight).reshape(2, 9, 5, 4)
    assert relative(got.detach(), conv(x).detach()) <= 1e-12


def test_convolution_of_given_labels() -> None:
    """rows and columns by hand from the layer's patches and the output's gradient (Grosse & Martens 2016)."""
    model, x = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten()).double(), randn(4, 2, 3, 3)
    likelihood = Given(1.0).double()
    likelihood.labels = randn(4, 12, seed=1)
    (got,) = moments(model, likelihood, x)
    patches = torch.stack([x[b, :, i : i + 2, j : j + 2].reshape(-1) for b in range(4) for i in (0, 1) for j in (0, 1)])
    delta = (model(x) - likelihood.labels).detach().reshape(4, 3, 4).movedim(1, -1).reshape(-1, 3)
    assert relative(got["columns"], with_ones(patches).T @ with_ones(patches) / 16) <= 1e-12
    assert relative(got["rows"], delta.T @ delta / 4) <= 1e-12  # summed over positions, a mean over samples


def test_embedding() -> None:
    """rows: how often each word occurs; columns from the embedded vectors' gradients. Padding has no gradient."""
    model = nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Flatten()).double()
    x = torch.tensor([[1, 3], [3, 0], [4, 3]])
    likelihood = Given(1.0).double()
    likelihood.labels = randn(3, 6, seed=1)
    (got,) = moments(model, likelihood, x)
    assert got["rows"].shape == (5,)
    assert relative(got["rows"], torch.tensor([0, 1, 0, 3, 1]).double() / 5) <= 1e-7
    delta = (model(x) - likelihood.labels).detach().reshape(6, 3)[x.reshape(-1) != 0]
    assert relative(got["columns"], delta.T @ delta / 3) <= 1e-12


def test_diagonal_structure_of_a_linear_layer() -> None:
    model, x = nn.Linear(3, 2).double(), randn(1, 3)
    likelihood = Given(1.0).double()
    likelihood.labels = randn(1, 2, seed=1)
    (got,) = moments(model, likelihood, x, structure="diagonal")
    g = (model(x) - likelihood.labels).detach().T @ with_ones(x)
    assert relative(got["diagonal"], g**2) <= 1e-12


@pytest.mark.parametrize("batch", [1, 3, 8, 50])
def test_moments_from_gradients_where_a_layer_is_unseen(batch: int) -> None:
    """A parameter of no known layer: E of the mean over several gradients estimates F's diagonal."""

    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(randn(3, seed=3))

        def forward(self, x: Tensor) -> Tensor:
            return self.gain * x

    model, x = Gain(), randn(batch, 3)
    passes = IsolatedPasses(model, None, None, GaussianLikelihood(0.5), [x], 0)
    draws = [second_moments(passes, blocks_of(model), Inputs.of(x))[0]["diagonal"] for _ in range(150)]
    samples = torch.stack(draws).reshape(150, 3)
    want = explicit_fisher(model, x, "gaussian", 0.5).diagonal()
    error = samples.std(0) / math.sqrt(len(draws))
    if batch > 8:  # gradients of several samples each: the chunks are of unequal sizes
        assert relative(samples.mean(0), want) <= 0.2
    else:
        assert ((samples.mean(0) - want).abs() <= 5 * error + 1e-7).all()


@pytest.mark.parametrize("batch", [2, 3, 9, 15])
def test_small_batches_of_a_model_with_batchnorm(batch: int) -> None:
    """In training a BatchNorm refuses a single sample: no pass may hand it one when the batch has more."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    for found in moments(model, GaussianLikelihood(), randn(batch, 3)):
        assert found and all(torch.isfinite(t).all() for t in found.values())


NORMS = {
    "LayerNorm": (lambda: nn.LayerNorm(5), (4, 3, 5)),
    "LayerNorm over two": (lambda: nn.LayerNorm((3, 5)), (4, 2, 3, 5)),
    "LayerNorm without a bias": (lambda: nn.LayerNorm(5, bias=False), (4, 5)),
    "LayerNorm on one sample": (lambda: nn.LayerNorm(5), (5,)),
    "RMSNorm": (lambda: nn.RMSNorm(5), (4, 3, 5)),
    "RMSNorm with an eps": (lambda: nn.RMSNorm(5, eps=0.5), (4, 5)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6), (4, 6, 3, 2)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), (4, 6)),
    "BatchNorm1d on sequences": (lambda: nn.BatchNorm1d(6), (4, 6, 3)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6), (4, 6, 3, 2)),
    "BatchNorm2d in eval mode": (lambda: nn.BatchNorm2d(6).eval(), (4, 6, 3, 2)),
    "BatchNorm2d without running statistics": (lambda: nn.BatchNorm2d(6, track_running_stats=False), (4, 6, 3, 2)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(2), (4, 2, 3, 2, 2)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(6, affine=True), (4, 6, 7)),
    "InstanceNorm2d on one sample": (lambda: nn.InstanceNorm2d(6, affine=True), (6, 7, 3)),
    "InstanceNorm2d in eval mode": (
        lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True).eval(), (4, 6, 7, 3)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_norms_show_the_gradient_of_each_sample(name: str) -> None:
    make, shape = NORMS[name]
    layer = make().double()
    for p in [*layer.parameters(), *(b for b in layer.buffers() if b.is_floating_point())]:
        p.data.uniform_(0.5, 2)
    block, x = blocks_of(nn.Sequential(layer))[0], randn(*shape).requires_grad_()
    before = copy.deepcopy(layer.state_dict())
    y = copy.deepcopy(layer)(x)
    e = randn(*y.shape, seed=1)
    rows = layer_of(layer).rows(block, x.detach(), e)
    assert rows is not None and all(torch.equal(t, before[k]) for k, t in layer.state_dict().items())
    a, g = rows
    samples = shape[0] if len(a) > 1 else 1
    assert a.shape == (samples, 1) and g.shape == (samples, block.shape[0])
    for k in range(samples):  # y keeps the whole batch's statistics, and only one sample's output counts
        mask = torch.zeros_like(e)
        mask[k if samples > 1 else ...] = 1
        twin = copy.deepcopy(layer)
        want = torch.autograd.grad((twin(x) * e * mask).sum(), list(twin.parameters()))
        assert relative(g[k], torch.cat([w.reshape(-1) for w in want])) <= 1e-12


def test_a_norm_of_ones_own_is_left_to_gradients() -> None:
    class Own(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) ** 3

    layer = Own(5).double()
    block = blocks_of(nn.Sequential(layer))[0]
    assert layer_of(layer).rows(block, randn(4, 5), randn(4, 5)) is None


@pytest.mark.parametrize(("batch", "passes"), [(20, 1), (64, 1)])
def test_one_pass_shows_all_layers_with_norms(batch: int, passes: int) -> None:
    calls = Unseen()
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    model[0].register_forward_hook(lambda *_: calls.append(1))
    found = moments(model, GaussianLikelihood(), randn(batch, 3))
    assert len(calls) == passes + 1 and all(found)  # in the first one what layers show is checked


def test_layer_used_twice_adds_up_and_tied_weights_are_left_to_gradients() -> None:
    layer = nn.Linear(3, 3).double()
    model = nn.Sequential(layer, layer)
    likelihood = Given(1.0).double()
    x, likelihood.labels = randn(5, 3), randn(5, 3, seed=1)
    passes = IsolatedPasses(model, None, None, likelihood, [x], 0)
    found = second_moments(passes, blocks_of(model), passes.inputs())
    assert len(found) == 1
    h = layer(x).detach()
    second = (layer(h) - likelihood.labels).detach()
    first = second @ layer.weight.detach()
    assert relative(found[0]["rows"], (second.T @ second + first.T @ first) / 5) <= 1e-12


def test_damped_start_from_moments_is_near_the_exact_inverse() -> None:
    """One linear layer, Gaussian: K-FAC's start is near (F + γI)⁻¹, up to its factored damping."""
    model, x = nn.Linear(3, 2).double(), randn(40, 3)
    block = blocks_of(model)[0]
    G, A = torch.eye(2).double() * 4, with_ones(x).T @ with_ones(x) / 40
    F = block_order(model, explicit_fisher(model, x, "gaussian", 0.5))
    assert relative(torch.kron(G, A), F) <= 1e-6  # 0.5 is stored in float32
    gaps = []
    for damping in (1e-2, 1e-4, 1e-6):
        block.structure.start_kfac({"rows": G, "columns": A}, damping)
        R, L = full(block.structure.fishleg_aux["R"], 2), full(block.structure.fishleg_aux["L"], 4)
        Q = torch.kron(R.T @ R, L @ L.T)
        gaps.append(relative(Q, torch.linalg.inv(F + damping * torch.eye(8))))
    assert gaps[0] <= 0.25 and gaps[1] <= 0.03 and gaps[2] <= 0.003  # the factored damping's error is O(√γ)
