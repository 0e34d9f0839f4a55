"""Auxiliary passes leave a model as it was, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fishleg_fast import FishLeg
from fishleg_fast.algebra.structures.base import LayerStatistics
from fishleg_fast.fisher import moments, products
from fishleg_fast.fisher.layer_pass import Share
from fishleg_fast.likelihoods import GaussianLikelihood
from fishleg_fast.model.assemble import build_blocks
from fishleg_fast.passes.inputs import Inputs
from fishleg_fast.passes.isolated import IsolatedPasses
from support.dense import randn
from support.unseen import Unseen


class Everything(nn.Module):
    """Running statistics, dropout, a module under two names, tied weights, a frozen part in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=0.5), nn.Dropout(0.4))
        self.shared = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
        self.again = self.shared
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.2, batch_first=True)
        self.frozen = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.9)).eval().requires_grad_(False)
        self.inner, self.out = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.out.weight = self.inner.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(4))
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)  # a new tensor at every call
        h = torch.relu(self.again(torch.relu(self.shared(self.first(x)))))
        h = h + self.attention(h[:, None], h[:, None], h[:, None])[0][:, 0]
        return self.out(self.inner(self.frozen(h)))


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Everything()
        model(randn(8, 4, dtype=torch.float32)).square().sum().backward()
    return model


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything there is to know of the model and of torch's generator."""
    seen: dict[str, object] = {"rng": torch.get_rng_state(), "default grad": torch.is_grad_enabled()}
    for path, module in model.named_modules(remove_duplicate=False):
        seen[path + " training"] = module.training
        seen[path + " hooks"] = (
            len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        )
        seen[path + " children"] = [id(child) for child in module._modules.values()]
        for name, t in [*module._parameters.items(), *module._buffers.items()]:
            if t is None:
                continue
            key = f"{path}.{name}"
            grad = None if t.grad is None else t.grad.clone()
            seen[key] = t.detach().clone()
            seen[key + " grad"] = grad
            seen[key + " is"] = id(t), type(t), t.requires_grad, t.data_ptr(), id(t.grad), t._version
    return seen


def same(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """The keys that differ."""
    assert list(before) == list(after)
    equal = {
        key: torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for (key, a), b in zip(before.items(), after.values(), strict=True)
    }
    return [key for key, value in equal.items() if not value]


def trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def make_passes(model: nn.Module, loader: object = None) -> IsolatedPasses:
    x = randn(8, 4, seed=1, dtype=torch.float32)
    return IsolatedPasses(model, None, None, GaussianLikelihood(), [x] if loader is None else loader, 0)


def run(name: str, model: nn.Module, passes: IsolatedPasses) -> list[Tensor]:
    if name == "moments":
        blocks = build_blocks(model, list(model.parameters()), "kron", None)
        shares: list[Share] = []
        moments.moments(passes, blocks, passes.inputs(), shares.append)
        shown = [found for share in shares for found in share.statistics]
        return [t for found in shown for t in (found[:2] if isinstance(found, LayerStatistics) else found.values())]
    params = trainable(model)
    vs = [torch.ones_like(p) for p in params]
    with torch.no_grad():
        return products.FISHER[name](passes, params, vs, passes.inputs())


NAMES = [*products.FISHER, "moments"]


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_leaves_the_model_as_it_was(name: str, model: nn.Module) -> None:
    passes = make_passes(model)
    model(randn(8, 4, seed=3, dtype=torch.float32))  # a training step since: .mean is a new tensor
    before = snapshot(model)
    for _ in range(2):
        result = run(name, model, passes)
    assert result and all(torch.isfinite(t).all() and not t.requires_grad for t in result)
    assert same(before, snapshot(model)) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_failing_pass_leaves_the_model_as_it_was(name: str, model: nn.Module) -> None:
    passes = make_passes(model, [randn(8, 4, dtype=torch.float32)])
    handle = model.out.register_forward_hook(lambda *_: (_ for _ in ()).throw(OSError("stop")))
    before = snapshot(model)
    with pytest.raises(OSError, match="stop"):
        run(name, model, passes)
    assert same(before, snapshot(model)) == []
    handle.remove()


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_does_not_change_what_the_model_computes_next(name: str, model: nn.Module) -> None:
    """Dropout masks, statistics and gradients of the next training step are those of a run without the pass."""
    model.zero_grad()
    other, x = copy.deepcopy(model), randn(8, 4, seed=2, dtype=torch.float32)
    outputs = []
    for net in (model, other):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            if net is model:
                run(name, model, make_passes(model))
            outputs.append(net(x))
            outputs[-1].sum().backward()
    assert torch.equal(*outputs)
    for (key, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), key
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad), key
    for (key, b), c in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(b, c), key


@pytest.mark.parametrize("name", NAMES)
def test_passes_repeat_under_a_seed_and_differ_between_calls(name: str, model: nn.Module) -> None:
    passes = make_passes(model)
    first, second = run(name, model, passes), run(name, model, passes)
    torch.rand(3)  # the user's own generator is no matter
    again = run(name, model, make_passes(model))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))  # dropout, labels


def test_dropout_is_on_in_training_and_off_in_evaluation(model: nn.Module) -> None:
    passes, params = make_passes(model), trainable(model)
    vs = [torch.ones_like(p) for p in params]
    model.eval()
    first, second = (products.ggn(passes, params, vs, passes.inputs()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_input_tap_is_silent_during_a_pass() -> None:
    net = nn.Linear(4, 2)
    passes = IsolatedPasses(net, None, None, GaussianLikelihood(), None, 0)
    x = randn(8, 4, dtype=torch.float32)
    net.forward(x)
    net(x[:5])
    held = passes.tap.last
    for name in NAMES:
        run(name, net, passes)
    assert passes.tap.last is held and isinstance(held, Inputs) and len(held.x) == 5
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.weight.zero_()
        assert torch.equal(twin(x), twin.bias.expand(8, 2)) and passes.tap.last is held  # a copy computes with its own


@pytest.mark.parametrize("fisher,twice", [("ggn", True), ("hessian", True), ("antithetic", False), ("rank1", False)])
def test_fused_attention_is_given_up_for_second_derivatives_alone(fisher: str, twice: bool) -> None:
    """Anchoring and products of first derivatives take the kernel that the user's own passes take."""
    anchoring, learning = Unseen(), Unseen()

    class Attends(nn.Linear):
        def __init__(self, seen: Unseen) -> None:
            super().__init__(4, 3)
            self.seen = seen

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(torch.backends.cuda.flash_sdp_enabled())
            return super().forward(x)

    net, likelihood = nn.Sequential(Attends(anchoring)), GaussianLikelihood()
    optimizer = FishLeg(net, likelihood=likelihood, fisher=fisher, anchor_every=0, update_aux_every=0, step_limit=None)
    likelihood.nll(torch.zeros(8, 3), net(torch.ones(8, 4))).backward()
    optimizer.step()  # anchors
    assert len(anchoring) >= 2 and all(anchoring)
    net = nn.Sequential(Attends(learning))
    pure = {"init": "sgd", "anchor_every": 0, "aux_update": "adam", "step_limit": None}
    optimizer = FishLeg(net, likelihood=likelihood, fisher=fisher, update_aux_every=1, **pure)
    likelihood.nll(torch.zeros(8, 3), net(torch.ones(8, 4))).backward()
    optimizer.step()  # learns
    kernels = list(learning)
    assert len(kernels) >= 2 and kernels[0] and (False in kernels) == twice
    assert torch.backends.cuda.flash_sdp_enabled()
