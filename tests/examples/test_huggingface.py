"""Likelihoods of transformers' models: their losses are the models', and leave out what those do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fishleg_fast import BernoulliLikelihood, CategoricalLikelihood, FishLeg, GaussianLikelihood
from fishleg_fast.integrations.huggingface import TrainerOptimizer, likelihood_of

SMALL = dict(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=11)


def head(name: str, **config: Any) -> nn.Module:
    """A module whose class has that name."""
    module = type(name, (nn.Linear,), {})(2, 2)
    module.config = SimpleNamespace(**config)
    return module


@pytest.mark.parametrize(
    ("name", "config", "kind"),
    [
        ("BertForSequenceClassification", {"num_labels": 3}, CategoricalLikelihood),
        ("BertForSequenceClassification", {"num_labels": 1}, GaussianLikelihood),
        ("ViTForImageClassification", {"problem_type": "multi_label_classification"}, BernoulliLikelihood),
        ("WhisperForAudioClassification", {"problem_type": "regression", "num_labels": 4}, GaussianLikelihood),
    ],
)
def test_of_samples(name: str, config: dict, kind: type) -> None:
    likelihood = likelihood_of(head(name, **config))
    assert type(likelihood) is kind and getattr(likelihood, "loss_mask", None) is None


@pytest.mark.parametrize(
    ("name", "config", "ahead"),
    [
        ("GPT2LMHeadModel", {}, 1),
        ("LlamaForCausalLM", {}, 1),
        ("BertForMaskedLM", {}, 0),
        ("BertForTokenClassification", {}, 0),
        ("T5ForConditionalGeneration", {"is_encoder_decoder": True}, 0),
    ],
)
def test_of_positions(name: str, config: dict, ahead: int) -> None:
    likelihood = likelihood_of(head(name, **config))
    assert isinstance(likelihood, CategoricalLikelihood) and likelihood.class_dim == -1
    labels = torch.tensor([[1, -100, 2, 3], [-100, 0, -100, 4]])
    want = [[True, False, True, True], [False, True, False, True]]
    if ahead:
        want = [[False, True, True, False], [True, False, True, False]]
    assert likelihood.mask_of((), {"labels": labels, "input_ids": labels}).tolist() == want  # type: ignore[union-attr]
    assert likelihood.mask_of((labels,), {}) is None


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("BertForQuestionAnswering", {}),
        ("DetrForObjectDetection", {}),
        ("LlavaForConditionalGeneration", {}),
        ("Linear", {}),
        ("BertForSequenceClassification", {"problem_type": "ranking"}),
    ],
)
def test_others_are_refused(name: str, config: dict) -> None:
    with pytest.raises(ValueError, match=f"but is: {name}; give FishLeg a likelihood= of your own"):
        likelihood_of(head(name, **config))


def made(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers", reason="make setup-examples installs it")
    torch.manual_seed(0)
    if name == "GPT2LMHeadModel":
        config = transformers.GPT2Config(
            vocab_size=11, n_positions=8, n_layer=1, n_head=2, n_embd=8, bos_token_id=0, eos_token_id=0, resid_pdrop=0.0
        )
    elif name == "LlamaForCausalLM":
        config = transformers.LlamaConfig(**SMALL, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    elif name == "T5ForConditionalGeneration":
        config = transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=11)
        config.decoder_start_token_id = config.pad_token_id = 0
    else:
        config = transformers.BertConfig(**SMALL)
    model = getattr(transformers, name)(config).double().eval()  # without dropout
    ids = torch.randint(1, 11, (4, 6))
    labels = ids.clone() if "Sequence" not in name else torch.randint(2, (4,))
    if labels.ndim > 1:
        labels = labels % 2 if "Token" in name else labels
        labels[:, :2] = -100
        labels[1:3, 4:] = -100
    return model, {"input_ids": ids, "labels": labels}


NAMES = [
    "GPT2LMHeadModel", "LlamaForCausalLM", "BertForMaskedLM", "BertForTokenClassification",
    "BertForSequenceClassification", "T5ForConditionalGeneration",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_targets_are_told_by_the_model_s_own_loss(name: str) -> None:
    """And steps that are too long shortened, without a change to the loop."""
    model, batch = made(name)
    optimizer, losses = FishLeg(model, likelihood=likelihood_of(model), lr=5.0), []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert optimizer.diagnostics()["shortened_steps"] > 3 and losses[-1] < losses[0]
    labels, passes = batch["labels"], optimizer._passes
    if name in ("GPT2LMHeadModel", "LlamaForCausalLM"):
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
    assert passes.tap is not None and passes.tap.last is not None
    targets = passes._targets(passes.tap.last)
    assert targets is not None and torch.equal(targets, labels)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_model_s(name: str) -> None:
    """Given targets where the mask has them, the nll is what the model says."""
    model, batch = made(name)
    outputs = model(**batch)
    likelihood = likelihood_of(model)
    labels = batch["labels"]
    mask = likelihood.mask_of((), batch)
    if mask is None:
        assert float(likelihood.nll(labels, outputs.logits)) == pytest.approx(float(outputs.loss))
        return
    targets = labels.roll(-1, 1)[mask] if name in ("GPT2LMHeadModel", "LlamaForCausalLM") else labels[mask]
    found = likelihood.masked(mask).nll(targets, outputs.logits)
    assert float(found) == pytest.approx(float(outputs.loss), rel=1e-5)  # which some take in float32


@pytest.mark.parametrize("name", NAMES)
def test_it_trains(name: str) -> None:
    model, batch = made(name)
    model.train()
    optimizer = TrainerOptimizer()(model, lr=0.02, update_aux_every=2, anchor_every=3)
    assert isinstance(optimizer, FishLeg)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    report = optimizer.diagnostics()
    assert report["aux_steps"] == 6 and report["skipped_aux_steps"] == report["skipped_steps"] == 0
    assert losses[-1] < losses[0]
    matrices = [b for b in optimizer.blocks if min(b.shape) > 1 and b.layer is not None]
    assert matrices and all(b.layer_agrees for b in matrices)
