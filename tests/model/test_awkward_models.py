"""Models, inputs and loops that break optimizers which run passes of their own."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from collections import namedtuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fishleg_fast import CategoricalLikelihood, FishLeg, GaussianLikelihood, Likelihood
from support.unseen import Unseen

LIKELIHOOD = CategoricalLikelihood()
Y = torch.arange(12) % 3


def step(net: nn.Module, optimizer: FishLeg, *args, y: Tensor = Y, **kwargs) -> None:
    optimizer.zero_grad()
    LIKELIHOOD.nll(y, net(*args, **kwargs)).backward()
    optimizer.step()


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


class Checkpointed(nn.Module):
    def __init__(self, on: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c, self.on = nn.Linear(5, 8), nn.Linear(8, 3), on
        self.b = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.c(checkpoint(self.b, h, use_reentrant=False) if self.on else self.b(h))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("fisher", ["ggn", "hessian", "antithetic", "rank1"])
def test_activation_checkpointing_changes_nothing(fisher: str) -> None:
    x, results = torch.randn(12, 5), []
    for on in (False, True):
        net = Checkpointed(on)
        optimizer = FishLeg(net, likelihood=LIKELIHOOD, fisher=fisher, update_aux_every=1)
        for _ in range(3):
            optimizer.zero_grad()
            LIKELIHOOD.nll(Y, net(x)).backward()
            before = [b.clone() for b in net.buffers()]  # the recomputation of the user's own pass has moved them
            optimizer.step()
            assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))
        results.append({**dict(net.named_parameters()), "aux": torch.tensor(optimizer.diagnostics()["aux_loss"])})
    for name in results[0]:
        torch.testing.assert_close(results[0][name].float(), results[1][name].float(), rtol=1e-4, atol=1e-5, msg=name)


def test_layers_that_start_at_zero_leave_lambda_in_scale() -> None:
    net = mlp()
    nn.init.zeros_(net[2].weight)
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, update_aux_every=1)
    x = torch.randn(12, 5)
    for _ in range(30):
        step(net, optimizer, x)
        assert abs(optimizer.diagnostics()["aux_loss"]) < 100
    assert optimizer.diagnostics()["skipped_aux_steps"] == 0


def test_a_gradient_that_turns_zero_stops_the_block() -> None:
    net = mlp()
    optimizer = FishLeg(net, likelihood=LIKELIHOOD)
    x = torch.randn(12, 5)
    for _ in range(3):
        step(net, optimizer, x)
    before = net[0].weight.clone()
    for _ in range(20):
        optimizer.zero_grad(set_to_none=False)
        net(x)
        optimizer.step()
    assert torch.equal(before, net[0].weight)


def test_the_users_functions_may_preprocess_what_the_model_is_given() -> None:
    net = mlp()
    seen = Unseen()
    net[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].abs().max().item()))

    def nll(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return LIKELIHOOD.nll(y, model.forward(x.flatten(1) / 255))

    def draw(model: nn.Module, x: Tensor) -> Tensor:
        return LIKELIHOOD.draw(model.forward(x.flatten(1) / 255))

    images = 255 * torch.rand(12, 1, 5)
    optimizer = FishLeg(net, draw, nll, LIKELIHOOD, [(images, Y)], update_aux_every=1)
    for _ in range(2):
        optimizer.zero_grad()
        nll(net, images, Y).backward()
        optimizer.step()
    assert max(seen) <= 1 and optimizer.diagnostics()["aux_steps"] == 2


class Opaque(torch.autograd.Function):
    """x² without a second derivative, as a raw kernel has none."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def test_an_operation_without_any_derivative_of_the_gradient_is_told_of() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(Opaque.apply(self.a(x)))

    net = Net()
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, update_aux_every=10)
    with pytest.warns(UserWarning, match="takes differences of the model's outputs"):
        step(net, optimizer, torch.randn(12, 5))
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, fisher="rank1", update_aux_every=10)
    step(net, optimizer, torch.randn(12, 5))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(50, 6), nn.Linear(6, 3)

    def forward(self, text: Tensor, offsets: Tensor) -> Tensor:
        return self.out(self.bag(text, offsets))


def test_inputs_that_cannot_be_cut_are_taken_whole() -> None:
    net, likelihood = Bag(), LIKELIHOOD
    text, offsets = torch.randint(50, (60,)), torch.arange(0, 60, 5)
    with pytest.warns(UserWarning, match="takes differences of the model's outputs"):
        step(net, FishLeg(net, likelihood=likelihood, curvature_batch=4, update_aux_every=10), text, offsets)
    optimizer = FishLeg(net, likelihood=likelihood, fisher="rank1", update_aux_every=1, curvature_batch=4)
    for _ in range(3):
        step(net, optimizer, text, offsets)
    assert optimizer.diagnostics()["aux_steps"] == 3


def test_namedtuples_and_packed_sequences_keep_their_type() -> None:
    batch = namedtuple("batch", "x, scale")

    class Net(nn.Linear):
        def forward(self, data):
            return super().forward(data.x) * data.scale[:, None]

    net = Net(5, 3)
    step(net, FishLeg(net, likelihood=LIKELIHOOD, curvature_batch=4), batch(torch.randn(12, 5), torch.ones(12)))

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.out = nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, packed):
            return self.out(self.lstm(packed)[1][0][0])

    net = Recurrent()
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(12, 6, 5), torch.arange(12) % 6 + 1, True, False)
    step(net, FishLeg(net, likelihood=LIKELIHOOD, curvature_batch=4), packed)


def test_modules_compiled_in_place() -> None:
    net = mlp()
    net[0] = torch.compile(net[0], backend="aot_eager")
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, update_aux_every=1)
    x = torch.randn(12, 5)
    for _ in range(2):
        step(net, optimizer, x)
    assert optimizer.diagnostics()["aux_steps"] == 2


def test_two_optimizers_share_a_model_and_its_inputs() -> None:
    net = mlp()
    first = FishLeg(net, likelihood=LIKELIHOOD, params=net[0].parameters())
    second = FishLeg(net, likelihood=LIKELIHOOD, params=net[2].parameters())
    LIKELIHOOD.nll(Y, net(torch.randn(12, 5))).backward()
    first.step()
    second.step()
    assert first._passes.tap is second._passes.tap


def test_inputs_written_to_by_the_model_or_read_once_are_the_users_own() -> None:
    class InPlace(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    net, x = InPlace(5, 3), torch.ones(12, 5)
    step(net, FishLeg(net, likelihood=LIKELIHOOD, update_aux_every=1), x)
    assert torch.equal(x, torch.full((12, 5), 2.0))


def test_pre_hooks_of_the_model_apply_once() -> None:
    net, seen = mlp(), Unseen()
    net.register_forward_pre_hook(lambda m, args: (args[0] / 255,))
    net[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].max().item()))
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, update_aux_every=1)
    step(net, optimizer, torch.full((12, 5), 255.0))
    assert list(seen) == pytest.approx([1.0] * len(seen)) and len(seen) > 1


def test_a_loader_over_a_stream_has_no_length() -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(torch.randn(40, 5))

    net = mlp()
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, aux_loader=torch.utils.data.DataLoader(Stream(), batch_size=8))
    step(net, optimizer, torch.randn(12, 5))


def test_a_likelihood_inside_the_model_is_trained_once() -> None:
    class Net(nn.Linear):
        def __init__(self) -> None:
            super().__init__(5, 3)
            self.noise = GaussianLikelihood(learn=True)

    net = Net()
    optimizer = FishLeg(net, likelihood=net.noise)
    assert [b.name for b in optimizer.blocks] == ["model", "noise.log_sigma"]
    net.noise.nll(torch.randn(12, 3), net(torch.randn(12, 5))).backward()
    optimizer.step()


def test_functional_transforms_between_forward_and_step() -> None:
    net, x = mlp(), torch.randn(12, 5)
    optimizer = FishLeg(net, likelihood=LIKELIHOOD)
    LIKELIHOOD.nll(Y, net(x)).backward()
    params = dict(net.named_parameters())
    torch.func.vmap(lambda row: torch.func.functional_call(net, params, (row,)))(x)
    optimizer.step()


def test_the_tap_leaves_with_its_optimizer_and_tells_the_models_signature() -> None:
    net = mlp()
    optimizer = FishLeg(net, likelihood=LIKELIHOOD)
    step(net, optimizer, torch.randn(12, 5))
    assert list(inspect.signature(net.forward).parameters) == ["input"]
    del optimizer
    gc.collect()
    assert "forward" not in net.__dict__
    optimizer, gone = FishLeg(net, likelihood=LIKELIHOOD), weakref.ref(net)
    del net, optimizer
    gc.collect()
    assert gone() is None


def test_the_optimizer_itself_is_not_copied() -> None:
    with pytest.raises(TypeError, match=r"use state_dict\(\)"):
        copy.deepcopy(FishLeg(mlp(), likelihood=LIKELIHOOD))


def test_a_refused_group_changes_nothing_and_a_removed_one_rests() -> None:
    net = mlp()
    groups = [{"params": list(net[0].parameters())}, {"params": list(net[2].parameters())}]
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, params=groups)
    with pytest.raises(ValueError, match="parameters of the model"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 2
    del optimizer.param_groups[1]
    before = net[2].weight.clone()
    step(net, optimizer, torch.randn(12, 5))
    assert torch.equal(before, net[2].weight)


def test_one_momentum_a_block() -> None:
    net = nn.Linear(5, 3)
    groups = [{"params": [net.weight], "beta": 0.5}, {"params": [net.bias]}]
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, params=groups)
    with pytest.raises(ValueError, match="beta should be one"):
        step(net, optimizer, torch.randn(12, 5))


def test_one_cycle_schedule() -> None:
    net = mlp()
    optimizer = FishLeg(net, likelihood=LIKELIHOOD)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=4, cycle_momentum=False)
    for _ in range(3):
        step(net, optimizer, torch.randn(12, 5))
        schedule.step()


def test_models_that_differentiate_by_their_input() -> None:
    class Force(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]

    net, likelihood = Force(), GaussianLikelihood()
    optimizer = FishLeg(net, likelihood=likelihood, fisher="rank1", update_aux_every=1)
    likelihood.nll(torch.randn(12, 3), net(torch.randn(12, 3, requires_grad=True))).backward()
    optimizer.step()
    assert optimizer.diagnostics()["aux_steps"] == 1


def test_a_likelihood_with_nothing_but_nll_and_draw() -> None:
    class Poisson(Likelihood):
        def nll(self, targets: Tensor, outputs: Tensor) -> Tensor:
            return nn.functional.poisson_nll_loss(outputs, targets)

        def draw(self, outputs: Tensor) -> Tensor:
            return torch.poisson(outputs.exp())

    net, likelihood = mlp(), Poisson()
    optimizer = FishLeg(net, likelihood=likelihood, update_aux_every=1)
    x = torch.randn(12, 5)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = likelihood.nll(torch.ones(12, 3), net(x))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
