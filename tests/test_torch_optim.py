"""What a user of torch.optim takes for granted."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from fishleg_fast import FishLeg
from support.classifier import LIKELIHOOD, data, make, same, train, weights


def test_closure_is_evaluated_with_gradients_and_its_loss_returned() -> None:
    net, optimizer = make()
    other, expected = make()
    x, y = data(0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = LIKELIHOOD.nll(y, net(x))
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert [loss.item()] == train(other, expected, 1)
    assert same(weights(net), weights(other))


def test_step_without_any_gradient_does_nothing() -> None:
    net, optimizer = make()
    before = weights(net)
    optimizer.step()
    assert same(before, weights(net)) and optimizer.diagnostics()["steps"] == 0


def test_parameter_groups_have_their_own_lr_and_decay() -> None:
    net, _ = make()
    groups = [{"params": net[0].parameters(), "lr": 0.0}, {"params": net[2].parameters(), "weight_decay": 0.5}]
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, params=groups, lr=0.02)
    assert [g["lr"] for g in optimizer.param_groups] == [0.0, 0.02]
    before = weights(net)
    train(net, optimizer, 1)
    after = weights(net)
    assert same(before[:2], after[:2]) and not torch.equal(before[2], after[2])


def test_weight_and_bias_of_one_layer_may_be_in_different_groups() -> None:
    net, _ = make()
    biases = [p for p in net.parameters() if p.ndim == 1]
    matrices = [p for p in net.parameters() if p.ndim == 2]
    decayed = FishLeg(
        net, likelihood=LIKELIHOOD, params=[{"params": matrices, "weight_decay": 0.1}, {"params": biases}]
    )
    assert [b.shape for b in decayed.blocks] == [(12, 7), (4, 13)]
    twin, plain = make(update_aux_every=0, anchor_every=50)
    before = weights(net)
    train(net, decayed, 1)
    train(twin, plain, 1)
    for p, q, start in zip(net.parameters(), twin.parameters(), before, strict=True):
        torch.testing.assert_close(p, q - (1e-2 * 0.1 * start if p.ndim == 2 else 0))


def test_named_parameters_as_params() -> None:
    net, _ = make()
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, params=net.named_parameters())
    assert train(net, optimizer, 2)


def test_a_layer_can_be_unfrozen_later() -> None:
    net, _ = make()
    net[0].requires_grad_(False)
    optimizer = FishLeg(net, likelihood=LIKELIHOOD)
    train(net, optimizer, 3)
    net[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(net[0].parameters()), "lr": 1e-3})
    before = weights(net)
    train(net, optimizer, 3, start=3)
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))
    assert len(optimizer.blocks) == 2


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers(tensor_lr: bool) -> None:
    net, optimizer = make(lr=torch.tensor(0.02) if tensor_lr else 0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    for step in range(4):
        train(net, optimizer, 1, start=step)
        schedule.step()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.0, abs=1e-9)
    before = weights(net)
    train(net, optimizer, 1, start=9)
    for p, q in zip(before, weights(net), strict=True):
        torch.testing.assert_close(p, q, atol=1e-7, rtol=0)


def test_tensor_lr_and_float_lr_agree() -> None:
    results = []
    for lr in (0.02, torch.tensor(0.02)):
        net, optimizer = make(lr=lr)
        train(net, optimizer, 4)
        results.append(weights(net))
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q)


def test_maximize_mirrors_minimising_the_negative() -> None:
    results = []
    for sign in (1, -1):
        net, optimizer = make(maximize=sign < 0, momentum="before")
        for step in range(4):
            x, y = data(step)
            optimizer.zero_grad()
            (sign * LIKELIHOOD.nll(y, net(x))).backward()
            optimizer.step()
        results.append(weights(net))
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q)


def test_accumulated_gradients_equal_the_whole_batchs() -> None:
    net, optimizer = make(update_aux_every=0)
    other, whole = make(update_aux_every=0)
    x, y = data(0)
    optimizer.zero_grad()
    for half in (slice(0, 10), slice(10, 20)):
        (LIKELIHOOD.nll(y[half], net(x[half])) / 2).backward()
    net(x)  # so that both anchor on the same inputs
    optimizer.step()
    train(other, whole, 1)
    for p, q in zip(weights(net), weights(other), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_step_hooks_and_profiler_names() -> None:
    net, optimizer = make()
    calls = []
    optimizer.register_step_pre_hook(lambda *a: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *a: calls.append("post"))
    train(net, optimizer, 2)
    assert calls == ["pre", "post"] * 2


def test_zero_grad_and_zero_gradients_leave_everything_finite_and_unchanged() -> None:
    net, optimizer = make(update_aux_every=1)
    x, y = data(0)
    LIKELIHOOD.nll(y, net(x)).backward()
    optimizer.zero_grad(set_to_none=False)
    before = weights(net)
    aux = {k: t.clone() for k, t in net[0].fishleg_aux.items()}
    optimizer._anchor(optimizer.blocks, 0)
    started = {k: t.clone() for k, t in net[0].fishleg_aux.items()}
    assert not torch.equal(aux["L"], started["L"])
    for _ in range(3):
        optimizer.step()
    assert same(before, weights(net))
    assert all(torch.isfinite(t).all() for t in net[0].fishleg_aux.values())


def test_sparse_gradients_are_as_good_as_dense_ones() -> None:
    results = []
    for sparse in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(11, 5, sparse=sparse), nn.Flatten(), nn.Linear(15, 4))
        optimizer = FishLeg(net, likelihood=LIKELIHOOD)
        for step in range(4):
            x = torch.randint(11, (16, 3), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            LIKELIHOOD.nll(x[:, 0] % 4, net(x)).backward()
            optimizer.step()
        results.append(weights(net))
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q)


def test_grad_scaler() -> None:
    net, optimizer = make()
    other, plain = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        x, y = data(step)
        optimizer.zero_grad()
        scaler.scale(LIKELIHOOD.nll(y, net(x))).backward()
        scaler.step(optimizer)
        scaler.update()
    train(other, plain, 3)
    for p, q in zip(weights(net), weights(other), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    x, y = data(9)
    optimizer.zero_grad()
    scaler.scale(LIKELIHOOD.nll(y, net(x)) * float("inf")).backward()
    before = weights(net)
    scaler.step(optimizer)
    assert same(before, weights(net))


def test_training_under_autocast() -> None:
    net, optimizer = make()
    for step in range(6):
        x, y = data(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = LIKELIHOOD.nll(y, net(x))
            loss.backward()
            optimizer.step()
    assert torch.isfinite(loss) and optimizer.diagnostics()["skipped_aux_steps"] == 0
    assert all(t.dtype == torch.float32 for t in net[0].fishleg_aux.values())


def test_capturable_takes_the_same_steps() -> None:
    net, optimizer = make()
    other, capturable = make(capturable=True)
    train(net, optimizer, 6)
    train(other, capturable, 6)
    for p, q in zip(weights(net), weights(other), strict=True):
        torch.testing.assert_close(p, q)
    before = weights(other)
    x, y = data(7)
    capturable.zero_grad()
    (LIKELIHOOD.nll(y, other(x)) * float("nan")).backward()
    capturable.step()
    assert same(before, weights(other)) and capturable.diagnostics()["skipped_steps"] == 1


@pytest.mark.parametrize("clone", ["deepcopy", "pickle"])
def test_models_are_copied_without_the_optimizer(clone: str) -> None:
    net, optimizer = make()
    train(net, optimizer, 2)
    if clone == "deepcopy":
        other = copy.deepcopy(net)
    else:
        buffer = io.BytesIO()
        torch.save(net, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert len(other[0].fishleg_aux) == 0 and len(net[0].fishleg_aux) == 2
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
        assert not other(data(0)[0]).any() and net(data(0)[0]).any()  # its own forward, on its own parameters
    assert train(net, optimizer, 1)


def test_compiled_and_data_parallel_wrappers() -> None:
    net, _ = make()
    for wrapped in (torch.compile(net, backend="eager"), nn.DataParallel(net)):
        optimizer = FishLeg(wrapped, likelihood=LIKELIHOOD, update_aux_every=1)
        assert len(train(wrapped, optimizer, 3)) == 3
        assert optimizer.diagnostics()["aux_steps"] == 3
