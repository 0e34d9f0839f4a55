"""Positions that the loss leaves out: a training on the others alone is the same one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fishleg_fast import CategoricalLikelihood, FishLeg
from fishleg_fast.fisher import layer_pass
from support.dense import relative

IGNORED = -100
WORDS, CLASSES = 7, 3


class PerPosition(nn.Module):
    """Words to logits, each position by itself: (B, T) -> (B, T, C), and (N,) -> (N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 5)
        self.hidden = nn.Linear(5, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, words: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(words))))


class Pixels(nn.Module):
    """The same of images: (B, H, W) -> (B, C, H, W) by convolutions of one pixel, and (N,) -> (N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 4)
        self.hidden = nn.Conv2d(4, 6, 1, groups=2)
        self.head = nn.Conv2d(6, CLASSES, 1)

    def forward(self, words: Tensor, labels: Tensor | None = None) -> Tensor:
        images = words if words.ndim == 3 else words[:, None, None]
        outputs = self.head(torch.tanh(self.hidden(self.embedding(images).movedim(-1, 1))))
        return outputs if words.ndim == 3 else outputs[:, :, 0, 0]


def batches(steps: int, shape: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Words and targets, of which about a third is left out, and all of the last sample."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(steps):
        words = torch.randint(WORDS, shape, generator=generator)
        targets = torch.randint(CLASSES, shape, generator=generator)
        targets[torch.rand(shape, generator=generator) < 0.35] = IGNORED
        targets[-1] = IGNORED
        found.append((words, targets))
    return found


def train(
    net: nn.Module, likelihood: CategoricalLikelihood, data: list[tuple[Tensor, Tensor]], label: bool, **options: Any
) -> tuple[list[Tensor], dict[str, Any]]:
    options = {"normalize": "rms", "curvature_batch": None, "update_aux_every": 2, "anchor_every": 3} | options
    optimizer = FishLeg(net, likelihood=likelihood, lr=0.05, seed=11, **options)
    for words, targets in data:
        optimizer.zero_grad()
        outputs = net(words, labels=targets) if label else net(words)
        if label:  # a loss of the user's own
            logits = outputs.movedim(likelihood.class_dim, -1).flatten(0, -2)
            loss = nn.functional.cross_entropy(logits, targets.flatten())
        else:
            loss = likelihood.nll(targets, outputs)
        loss.backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()], optimizer.diagnostics()


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(5)
    return kind().double()


def counts(words: Tensor, labels: Tensor) -> Tensor:
    return labels != IGNORED


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "diagkron": {"structure": "diagkron"},
    "diagonal": {"structure": "diagonal"},
    "hessian": {"fisher": "hessian"},
    "antithetic": {"fisher": "antithetic"},
    "rank1": {"fisher": "rank1"},
    "pure": {"init": "sgd", "anchor_every": 0},
    "spectral": {"normalize": "spectral"},
    "training": {"anchor_from": "training"},
    "reference": {"backend": "reference"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", [PerPosition, Pixels])
@pytest.mark.parametrize("label", [False, True], ids=["nll", "loss_mask"])
def test_training_is_that_on_the_positions_that_count(name: str, kind: type[nn.Module], label: bool) -> None:
    shape, classes = ((4, 6), -1) if kind is PerPosition else ((4, 3, 2), 1)
    data = batches(7, shape)
    alone = [(words[targets != IGNORED], targets[targets != IGNORED]) for words, targets in data]
    told = CategoricalLikelihood(classes, loss_mask=counts if label else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine, report = train(made(kind), told, data, label, **OPTIONS[name])
        want, expected = train(made(kind), CategoricalLikelihood(), alone, False, **OPTIONS[name])
    for key in ("steps", "aux_steps", "anchors", "skipped_steps", "skipped_aux_steps"):
        assert report[key] == expected[key]
    assert report["anchors"] > 0 or name == "pure"
    errors = [relative(a, b) for a, b in zip(mine, want, strict=True)]
    assert max(errors) < 1e-9, errors


def test_a_convolution_s_patches_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches(7, (4, 3, 2))
    want, _ = train(made(Pixels), CategoricalLikelihood(), data, False)
    monkeypatch.setattr(layer_pass, "ENTRIES", 30)
    mine, _ = train(made(Pixels), CategoricalLikelihood(), data, False)
    assert max(relative(a, b) for a, b in zip(mine, want, strict=True)) < 1e-9


def test_a_compiled_loss_tells_its_mask_too() -> None:
    data = batches(4, (4, 6))
    want, _ = train(made(PerPosition), CategoricalLikelihood(-1), data, False)
    likelihood = CategoricalLikelihood(-1)
    likelihood.nll = torch.compile(likelihood.nll, backend="eager")  # type: ignore[method-assign]
    mine, _ = train(made(PerPosition), likelihood, data, False)
    assert max(relative(a, b) for a, b in zip(mine, want, strict=True)) < 1e-9


def test_what_is_left_out_makes_a_difference() -> None:
    """Without a mask the same training ends elsewhere: the test above can fail."""
    data = batches(7, (4, 6))
    masked, _ = train(made(PerPosition), CategoricalLikelihood(-1, loss_mask=counts), data, True)
    whole, _ = train(made(PerPosition), CategoricalLikelihood(-1), data, True)
    assert max(relative(a, b) for a, b in zip(masked, whole, strict=True)) > 1e-4


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("classes", [1, -1])
def test_fisher_product_of_a_mask_is_the_hessian_of_the_loss(classes: int, weighted: bool) -> None:
    """Of the nll that leaves targets out, averaged over all targets that there could be."""
    torch.manual_seed(0)
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64) if weighted else None
    whole = CategoricalLikelihood(classes, weight=weight)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    outputs = torch.randn(2, CLASSES, 3, dtype=torch.float64) if classes == 1 else torch.randn(2, 3, CLASSES).double()
    v = torch.randn_like(outputs)
    likelihood = whole.masked(mask)
    assert likelihood.terms(outputs) == 3
    p = torch.softmax(outputs, classes).movedim(classes, -1)[mask]
    one = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    omega = torch.full((3,), 1 / 3, dtype=torch.float64) if weight is None else (p * weight).sum(1) / (p * weight).sum()
    want = torch.zeros(2, 3, CLASSES, dtype=torch.float64)
    want[mask] = (one @ v.movedim(classes, -1)[mask][:, :, None])[:, :, 0] * omega[:, None]
    assert relative(likelihood.fisher_product(outputs, v), want.movedim(-1, classes)) < 1e-12


def test_a_batch_in_which_nothing_counts_postpones() -> None:
    (words, targets), *rest = batches(4, (4, 6))
    net = made(PerPosition)
    optimizer = FishLeg(net, likelihood=CategoricalLikelihood(-1, loss_mask=counts), update_aux_every=1, lr=0.05)
    for words_, targets_ in [(words, torch.full_like(targets, IGNORED)), *rest]:
        optimizer.zero_grad()
        (net(words_, labels=targets_) * (targets_ != IGNORED)[..., None]).square().sum().backward()
        optimizer.step()
    report = optimizer.diagnostics()
    assert report["anchors"] == 1 and report["aux_steps"] == 3 and report["skipped_aux_steps"] == 0
    assert all(p.isfinite().all() for p in net.parameters())


def test_targets_of_other_positions_than_the_outputs_are_told_of() -> None:
    net, likelihood = made(PerPosition), CategoricalLikelihood(-1)
    optimizer = FishLeg(net, likelihood=likelihood, update_aux_every=1)
    (words, targets), *_ = batches(1, (4, 6))
    likelihood.nll(targets[:, 1:], net(words)[:, :-1]).backward()
    with pytest.warns(UserWarning, match=r"leaves out positions, but targets have shape \(4, 5\).*loss_mask tells"):
        optimizer.step()
    assert optimizer.diagnostics()["anchors"] == 1


WRONG: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "numbers": (lambda words: words, TypeError, "loss_mask should return a boolean tensor or None but returned: torch"),
    "a list": (lambda words: [True], TypeError, "loss_mask should return a boolean tensor or None but returned: list"),
    "one too few": (
        lambda words: (words < 4)[:, 1:],
        ValueError,
        r"loss_mask should return a mask of shape \(., 6\) for outputs .* but returned one of: \(., 5\)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_masks_are_refused_by_name(name: str) -> None:
    function, error, pattern = WRONG[name]
    net = made(PerPosition)
    optimizer = FishLeg(net, likelihood=CategoricalLikelihood(-1, loss_mask=function))
    (words, targets), *_ = batches(1, (4, 6))
    nn.functional.cross_entropy(net(words).flatten(0, 1), targets.flatten()).backward()
    with pytest.raises(error, match=pattern):
        optimizer.step()


def test_loss_mask_should_be_a_function() -> None:
    with pytest.raises(TypeError, match="loss_mask should be a function"):
        CategoricalLikelihood(loss_mask=torch.ones(3))  # type: ignore[arg-type]


def test_a_loss_mask_is_called_as_the_model_is() -> None:
    words, targets = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int64)
    likelihood = CategoricalLikelihood(-1, loss_mask=lambda outputs: outputs > 0)
    with pytest.raises(
        TypeError, match=r"called with, \(Tensor, labels=Tensor\), but cannot: got .*'labels'; .*lambda"
    ):
        likelihood.mask_of((words,), {"labels": targets})
    with pytest.raises(TypeError, match=r"^can't multiply") as raised:  # its own
        CategoricalLikelihood(-1, loss_mask=lambda words: [words] * "a").mask_of((words,), {})
    assert raised.value.__cause__ is None
