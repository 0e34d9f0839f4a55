"""What a batch was trained on, by a loss of the user's own: from its gradient with respect to the model's outputs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fishleg_fast import BernoulliLikelihood, CategoricalLikelihood, FishLeg, GaussianLikelihood, Likelihood
from support.dense import randn

Loss = Callable[[Tensor, Tensor], Tensor]
X, Y = randn(20, 4), torch.arange(20) % 3


def setup(likelihood: Likelihood | None = None, **settings: Any) -> tuple[nn.Module, FishLeg, Likelihood]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    likelihood = likelihood or CategoricalLikelihood()
    return net, FishLeg(net, likelihood=likelihood, **{"lr": 20.0, **settings}), likelihood


def weighted(y: Tensor, o: Tensor) -> Tensor:
    return (F.cross_entropy(o, y, reduction="none") * torch.linspace(0.5, 1.5, len(y)).double()).mean()


SAME: dict[str, Loss] = {
    "mean": lambda y, o: F.cross_entropy(o, y),
    "module": lambda y, o: nn.CrossEntropyLoss()(o, y),
    "a thousandth": lambda y, o: 1e-3 * F.cross_entropy(o, y),
    "sum": lambda y, o: F.cross_entropy(o, y, reduction="sum"),
    "smoothed": lambda y, o: F.cross_entropy(o, y, label_smoothing=0.1),
    "one-hot": lambda y, o: F.cross_entropy(o, F.one_hot(y, 3).double()),
    "log_softmax": lambda y, o: F.nll_loss(F.log_softmax(o, 1), y),
    "float32": lambda y, o: F.cross_entropy(o.float(), y),
    "with a penalty": lambda y, o: F.cross_entropy(o, y) + 1e-3 * o.square().mean(),
    "weighted": weighted,
    "class weights": lambda y, o: F.cross_entropy(o, y, weight=torch.tensor([0.01, 1.0, 0.3]).double()),
    "far from balanced": lambda y, o: 1e-9 * (F.cross_entropy(o, y, reduction="none") * torch.arange(1, 21) ** 4).sum(),
    "margin": lambda y, o: F.multi_margin_loss(o, y),
    "focal": lambda y, o: (
        (1 - F.softmax(o, 1).gather(1, y[:, None])[:, 0]) * F.cross_entropy(o, y, reduction="none")
    ).mean(),
}
OTHERS: dict[str, Loss] = {
    "squares": lambda y, o: (o - F.one_hot(y, 3)).square().mean(),
    "ascent": lambda y, o: -F.cross_entropy(o, y),
    "policy gradient": lambda y, o: ((torch.arange(20) % 2 - 0.5) * F.cross_entropy(o, y, reduction="none")).mean(),
    "no gradient": lambda y, o: 0 * o.sum(),
    "not finite": lambda y, o: F.cross_entropy(o, y) * float("inf"),
}


def seen(loss: Loss, x: Tensor = X, y: Tensor = Y, likelihood: Likelihood | None = None, **given: Any) -> Tensor | None:
    net, optimizer, _ = setup(likelihood, **given)
    loss(y, net(x)).backward()
    assert optimizer._passes.tap is not None and optimizer._passes.tap.last is not None
    return optimizer._passes._targets(optimizer._passes.tap.last)


@pytest.mark.parametrize("name", SAME)
def test_classes_are_told_by_cross_entropies(name: str) -> None:
    found = seen(SAME[name])
    assert found is not None and torch.equal(found, Y)


@pytest.mark.parametrize("name", OTHERS)
def test_other_losses_tell_nothing(name: str) -> None:
    assert seen(OTHERS[name]) is None


@pytest.mark.parametrize("name", ["mean", "sum", "weighted", "a thousandth"])
def test_binary_targets_are_told_by_binary_cross_entropies(name: str) -> None:
    y = (randn(20, 3) > 0.3).double()
    losses: dict[str, Loss] = {
        "mean": lambda y, o: F.binary_cross_entropy_with_logits(o, y),
        "sum": lambda y, o: F.binary_cross_entropy(o.sigmoid(), y, reduction="sum"),
        "weighted": lambda y, o: F.binary_cross_entropy_with_logits(o, y, pos_weight=torch.tensor(1.5).double()),
        "a thousandth": lambda y, o: 1e-3 * F.binary_cross_entropy_with_logits(o, y),
    }
    found = seen(losses[name], y=y, likelihood=BernoulliLikelihood())
    assert found is not None and torch.equal(found, y)


def test_grey_values_are_not() -> None:
    y = 0.5 + 0.1 * randn(20, 3).sigmoid()
    assert seen(lambda y, o: F.binary_cross_entropy_with_logits(o, y), y=y, likelihood=BernoulliLikelihood()) is None


@pytest.mark.parametrize("likelihood", [GaussianLikelihood(), BernoulliLikelihood()])
def test_nll_tells_whatever_it_is_of(likelihood: Likelihood) -> None:
    targets = randn(20, 3).sigmoid()
    found = seen(likelihood.nll, y=targets, likelihood=likelihood)
    assert found is not None and torch.equal(found, targets)


def test_squared_errors_are_not_told_by_their_gradient() -> None:
    assert seen(lambda y, o: F.mse_loss(o, y), y=randn(20, 3), likelihood=GaussianLikelihood()) is None


def test_positions_that_do_not_count_are_ignored() -> None:
    y = torch.where(torch.arange(20) % 4 == 0, -100, Y)
    found = seen(lambda y, o: F.cross_entropy(o, y), y=y)
    assert found is not None and torch.equal(found, y)


@pytest.mark.parametrize("flat", [False, True])
def test_language_models(flat: bool) -> None:
    net = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7)).double()
    optimizer = FishLeg(net, likelihood=CategoricalLikelihood(class_dim=-1), lr=20.0)
    words = torch.arange(4 * 300).reshape(4, 300) % 7
    targets = words.roll(-1, 1)
    outputs = net(words)
    loss = (
        F.cross_entropy(outputs.reshape(-1, 7), targets.reshape(-1)) if flat else F.cross_entropy(outputs.mT, targets)
    )
    loss.backward()
    optimizer.step()
    assert optimizer.diagnostics()["shortened_steps"] == 1
    assert optimizer._passes.tap is not None and optimizer._passes.tap.last is not None
    found = optimizer._passes._targets(optimizer._passes.tap.last)
    assert found is not None and torch.equal(found, targets)


@pytest.mark.parametrize("change", ["none", "clipped", "scaled", "accumulated"])
def test_steps_are_those_of_nll_bit_for_bit(change: str) -> None:
    """Whatever happens to gradients between the backward pass and the step."""

    def run(own: bool) -> list[Tensor]:
        net, optimizer, likelihood = setup()
        for _ in range(8):
            optimizer.zero_grad()
            for _ in range(2 if change == "accumulated" else 1):
                loss = F.cross_entropy(net(X), Y) if own else likelihood.nll(Y, net(X))
                (loss * (64 if change == "scaled" else 1)).backward()
            if change == "clipped":
                nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
            if change == "scaled":
                for p in net.parameters():
                    p.grad /= 64
            optimizer.step()
        assert optimizer.diagnostics()["shortened_steps"] > 3
        return [p.detach() for p in net.parameters()]

    for a, b in zip(run(True), run(False), strict=True):
        assert torch.equal(a, b)


def test_targets_go_with_the_inputs_they_were_for() -> None:
    net, optimizer, likelihood = setup()
    likelihood.nll(Y, net(X)).backward()
    net(X + 1)
    optimizer.step()
    assert optimizer.diagnostics()["step_scale"] is None
    optimizer.zero_grad()
    F.cross_entropy(net(X), Y).backward()
    with torch.no_grad():
        likelihood.nll(Y.roll(1), net(X + 1))
    optimizer.step()
    assert optimizer.diagnostics()["step_scale"] is not None


def test_targets_of_other_kinds_are_not_noted() -> None:
    likelihood, outputs = CategoricalLikelihood(), torch.zeros(3, 3, requires_grad=True)
    for targets in ((torch.zeros(3), torch.zeros(3)), torch.zeros(4), torch.zeros(())):
        likelihood.note(targets, outputs)  # type: ignore[arg-type]
        assert likelihood.noted is None


def test_gradients_are_looked_at_only_where_a_step_may_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    tells = CategoricalLikelihood.targets_behind
    monkeypatch.setattr(CategoricalLikelihood, "targets_behind", lambda *args: looks.append(1) or tells(*args))
    net, optimizer, _ = setup(lr=1e-6)
    for step in range(30):
        optimizer.zero_grad()
        F.cross_entropy(net(X), Y).backward()
        optimizer.step()
        assert len(looks) <= 1 + step
    assert 5 <= len(looks) <= 10
    net, optimizer, _ = setup(step_limit=None)
    before = len(looks)
    F.cross_entropy(net(X), Y).backward()
    assert len(looks) == before


def test_outputs_that_do_not_suit_the_likelihood_are_the_steps_to_tell_of() -> None:
    net = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)).double()
    FishLeg(net, likelihood=CategoricalLikelihood())
    net(X).sum().backward()


class Shifted(CategoricalLikelihood):
    """Labels from 1 on."""

    def nll(self, targets: Tensor, outputs: Tensor) -> Tensor:
        return super().nll(targets - 1, outputs)

    def draw(self, outputs: Tensor) -> Tensor:
        return super().draw(outputs) + 1


class Logs(GaussianLikelihood):
    def nll(self, targets: Tensor, outputs: Tensor) -> Tensor:
        return super().nll(targets.log(), outputs)


class Soft(BernoulliLikelihood):
    def nll(self, targets: Tensor, outputs: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, targets + 0.1)


@pytest.mark.parametrize("likelihood", [Shifted(), Logs(), Soft()])
def test_subclasses_with_targets_of_their_own_tell_nothing_unless_they_note_them(likelihood: Likelihood) -> None:
    targets = Y + 1 if isinstance(likelihood, Shifted) else (randn(20, 3) > 0).double()
    net, optimizer, _ = setup(likelihood)
    for _ in range(3):
        optimizer.zero_grad()
        likelihood.nll(targets + (0 if isinstance(likelihood, Shifted) else 1), net(X)).backward()
        optimizer.step()
    assert optimizer.diagnostics()["step_scale"] is None


def test_the_tensor_that_is_scored_is_looked_at() -> None:
    class Mapping(nn.Linear):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"hidden": x * self.bias[0], "logits": super().forward(x)}

    net = Mapping(4, 3).double()
    optimizer = FishLeg(net, likelihood=CategoricalLikelihood(), lr=20.0)
    F.cross_entropy(net(X)["logits"], Y).backward()
    optimizer.step()
    assert optimizer.diagnostics()["shortened_steps"] == 1


def test_hooks_do_not_pile_up_on_parameters_that_are_returned() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(randn(20, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.table

    net = Table()
    optimizer = FishLeg(net, likelihood=CategoricalLikelihood())
    for _ in range(3):
        F.cross_entropy(net(X), Y).backward()
        optimizer.step()
    assert not net.table._backward_hooks


def test_a_step_that_cannot_be_measured_is_told_of_once_and_left() -> None:
    class Guarded(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if torch.autograd.forward_ad._current_level >= 0:
                raise ValueError("no tangents here")
            return super().forward(x)

    def run(limit: float | None) -> list[Tensor]:
        torch.manual_seed(0)
        net, likelihood = Guarded(4, 3).double(), CategoricalLikelihood()
        optimizer = FishLeg(net, likelihood=likelihood, lr=1.0, step_limit=limit)
        for _ in range(3):
            optimizer.zero_grad()
            likelihood.nll(Y, net(X)).backward()
            optimizer.step()
        return [p.detach() for p in net.parameters()]

    with pytest.warns(UserWarning, match="could not be measured.*no tangents here") as told:
        found = run(1.0)
    assert len(told) == 1
    assert all(torch.equal(a, b) for a, b in zip(found, run(None), strict=True))


def test_nothing_is_kept_of_a_graph() -> None:
    net, optimizer, _ = setup()
    outputs = net(X)
    kept = weakref.ref(outputs)
    F.cross_entropy(outputs, Y).backward()
    optimizer.step()
    del outputs
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("why", ["another batch", "another order", "another head", "its own"])
@pytest.mark.parametrize("kind", ["categorical", "bernoulli", "gaussian"])
def test_targets_that_nll_had_of_other_outputs_are_not_taken(kind: str, why: str) -> None:
    """Of the same shape as the model's; the gradient tells that they are not what the model is trained on."""
    likelihood, y = {
        "categorical": (CategoricalLikelihood(), Y),
        "bernoulli": (BernoulliLikelihood(), (randn(20, 3) > 0).double()),
        "gaussian": (GaussianLikelihood(), randn(20, 3)),
    }[kind]
    net, optimizer, _ = setup(likelihood)
    other = nn.Linear(4, 3).double()
    outputs, order = net(X), torch.arange(20).roll(7)
    if why == "another order":
        loss = likelihood.nll(y[order], outputs[order])
    else:
        loss = likelihood.nll(y, outputs)
    if why == "another batch":
        likelihood.nll(y.roll(1, 0), net[0:](randn(20, 4, seed=3)))
    if why == "another head":
        loss = loss + likelihood.nll(y.flip(0), other(X))
    loss.backward()
    tap = optimizer._passes.tap
    assert tap is not None and tap.last is not None
    found = optimizer._passes._targets(tap.last)
    assert optimizer._passes._targets(tap.last) is found
    assert found is not None and torch.equal(found, y) if why == "its own" else found is None


@pytest.mark.parametrize("likelihood", [BernoulliLikelihood(), GaussianLikelihood(0.1)])
def test_one_number_a_sample(likelihood: Likelihood) -> None:
    net = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)).double()
    optimizer = FishLeg(net, likelihood=likelihood, lr=20.0)
    for y, told in (((torch.arange(20) % 2).double(), True), ((torch.arange(20) % 3 > 1).double(), False)):
        loss = likelihood.nll(y, net(X))
        if not told:
            likelihood.nll(1 - y, torch.zeros(20).double().requires_grad_())
        loss.backward()
        assert optimizer._passes.labelled() is told


class Contrastive(Likelihood):
    """Every row's gradient depends on all rows."""

    def nll(self, targets: Tensor, outputs: Tensor) -> Tensor:
        self.note(targets, outputs)
        return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)).roll(int(targets[0])))

    def draw(self, outputs: Tensor) -> Tensor:
        return torch.ones(len(outputs))

    def fisher_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        return v / len(outputs)


def test_an_nll_of_several_rows_together_is_looked_at_whole() -> None:
    likelihood, x = Contrastive(), randn(600, 4)
    assert likelihood.rows_between((600, 3)) == 1
    found = seen(likelihood.nll, x=x, y=torch.ones(600), likelihood=likelihood)
    assert found is not None


def test_few_rows_of_a_large_batch_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    likelihood, shapes = CategoricalLikelihood(class_dim=-1), []
    explains = CategoricalLikelihood.explains
    monkeypatch.setattr(
        CategoricalLikelihood, "explains", lambda self, y, o, g: shapes.append(o.shape) or explains(self, y, o, g)
    )
    net = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7)).double()
    optimizer = FishLeg(net, likelihood=likelihood, lr=20.0)
    words = torch.arange(64 * 100).reshape(64, 100) % 7
    for _ in range(2):
        likelihood.nll(words.roll(-1, 1), net(words)).backward()
        optimizer.step()
    assert shapes == [(8, 100, 7)] * 2 and optimizer.diagnostics()["shortened_steps"] == 2


def test_rows_that_all_do_not_count_are_no_contradiction() -> None:
    likelihood, y = CategoricalLikelihood(), torch.full((300,), -100)
    y[1] = 1  # every second row is looked at
    assert likelihood.rows_between((300, 3)) == 2
    found = seen(likelihood.nll, x=randn(300, 4), y=y, likelihood=likelihood)
    assert found is not None and torch.equal(found, y)


def test_noting_is_as_before_where_a_gradient_is_looked_at() -> None:
    y = torch.where(torch.arange(20) % 4 == 0, -100, Y)
    net, optimizer, likelihood = setup()
    likelihood.nll(y, net(X)).backward()
    optimizer.step()
    assert likelihood.scored is not None and torch.equal(likelihood.scored, y != -100)
    assert likelihood.noted is not None and torch.equal(likelihood.noted[0], y)
