"""What FishLeg has beside what torch.optim's optimizers have."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fishleg_fast import FishLeg, GaussianLikelihood
from fishleg_fast.precision import _fast_bfloat16
from support.classifier import data, make, same, train, weights


def test_trust_region_uses_the_lr_before_the_schedule() -> None:
    net, optimizer = make(normalize="trust", kappa=1e-6, lr=0.5)
    other, scheduled = make(normalize="trust", kappa=1e-6, lr=0.5)
    scheduled.param_groups[0]["lr"] = 0.05
    before = weights(net)
    train(net, optimizer, 1)
    train(other, scheduled, 1)
    for start, p, q in zip(before, weights(net), weights(other), strict=True):
        torch.testing.assert_close((p - start) / 10, q - start, rtol=1e-3, atol=1e-7)


def test_learned_noise_is_trained_with_the_model() -> None:
    torch.manual_seed(0)
    net, likelihood = nn.Linear(3, 2), GaussianLikelihood(sigma=1.0, learn=True)
    truth = nn.Linear(3, 2)
    optimizer = FishLeg(net, likelihood=likelihood, lr=0.05)
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 300)
        x = torch.randn(128, 3)
        y = truth(x).detach() + 0.3 * torch.randn(128, 2)
        optimizer.zero_grad()
        likelihood.nll(y, net(x)).backward()
        optimizer.step()
    assert likelihood.sigma.item() == pytest.approx(0.3, rel=0.1)


def test_negative_update_aux_every_is_that_many_updates_a_step() -> None:
    net, optimizer = make(update_aux_every=-3)
    train(net, optimizer, 2)
    assert optimizer.diagnostics()["aux_steps"] == 6


def test_pretraining_moves_lambda_and_nothing_else() -> None:
    net, optimizer = make()
    net(data(0)[0])
    before = weights(net)
    losses = optimizer.pretrain_aux(5)
    assert len(losses) == 5 and same(before, weights(net))
    assert optimizer.diagnostics()["aux_steps"] == 5 and optimizer.diagnostics()["steps"] == 0
    assert all(p.grad is None for p in net.parameters())


def test_diagnostics_and_writer() -> None:
    class Writer:
        def __init__(self) -> None:
            self.rows: list[tuple[str, float, int]] = []

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.rows.append((tag, value, step))

    writer = Writer()
    net, optimizer = make(writer=writer)
    assert optimizer.diagnostics()["aux_loss"] is None
    train(net, optimizer, 3)
    told = optimizer.diagnostics()
    assert set(told) == {
        "steps", "aux_steps", "anchors", "skipped_steps", "skipped_aux_steps", "aux_loss", "grad_norm", "nat_norm",
        "shortened_steps", "step_scale",
        "normalize", "factors",
    }  # fmt: skip
    assert told["steps"] == 3 and told["aux_steps"] == 2 and set(told["nat_norm"]) == {"0", "2"}
    assert {step for *_, step in writer.rows} == {1, 3}
    assert {tag for tag, *_ in writer.rows} >= {"fishleg/aux_loss", "fishleg/grad_norm", "fishleg/nat_norm/0"}


def settings_of_torch() -> tuple[str, str]:
    return torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision


@pytest.mark.parametrize("users", ["untouched", "legacy", "per backend"])
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_precision_holds_inside_the_optimizer_and_leaves_the_users_setting_alone(
    precision: str, users: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, legacy = settings_of_torch(), torch.get_float32_matmul_precision()
    try:
        if users == "legacy":
            torch.set_float32_matmul_precision("high")
        elif users == "per backend":
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        before = settings_of_torch()
        net, optimizer = make(precision=precision)
        inside = []
        theta_step = optimizer._ops.theta_step

        def spy(*args, **kwargs):
            inside.append(settings_of_torch())
            return theta_step(*args, **kwargs)

        monkeypatch.setattr(optimizer._ops, "theta_step", spy)
        train(net, optimizer, 2)
        assert settings_of_torch() == before
        expected = {"highest": ("ieee", "ieee"), "high": ("tf32", "tf32"), "medium": ("tf32", "tf32")}[precision]
        assert inside == [expected] * 2
        rounded = torch.bfloat16 if precision == "medium" and _fast_bfloat16() else torch.float32
        assert {block.structure.operand_dtype for block in optimizer.blocks} == {rounded}
    finally:
        torch.set_float32_matmul_precision(legacy)
        torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision = begin
