"""For models of transformers, which is not imported here: the likelihood whose nll their loss is, and what makes the
optimizer for their Trainer.

    Trainer(model, args, optimizer_cls_and_kwargs=(TrainerOptimizer, {"lr": 2e-2}), ...)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..likelihoods import BernoulliLikelihood, CategoricalLikelihood, GaussianLikelihood, Likelihood
from ..optimizer import FishLeg

CAUSAL = ("ForCausalLM", "LMHeadModel")
BY_TOKEN = ("ForMaskedLM", "ForTokenClassification")
BY_SAMPLE = tuple(
    f"For{kind}Classification" for kind in ("Sequence", "Image", "Video", "Audio")
)  # which name the kind of their labels in config.problem_type
BY_PROBLEM: dict[str, type[Likelihood]] = {
    "regression": GaussianLikelihood,
    "multi_label_classification": BernoulliLikelihood,
}


def likelihood_of(model: nn.Module, ignore_index: int = -100) -> Likelihood:
    """The likelihood whose nll is the loss that a model of transformers returns where it is given ``labels``.

    For language models, token and sequence classification; positions whose label is ``ignore_index`` (padding, prompts)
    are left out of the Fisher matrix, as they are of the loss, where the model itself is given the labels. A causal
    model's labels are moved by one, and nothing is asked of its last position.

    ValueError where the loss of a model is another one: give FishLeg a likelihood, or draw and nll, of your own.
    """
    kind, config = _kind(model), getattr(model, "config", None)
    seq2seq = kind.endswith("ForConditionalGeneration") and bool(getattr(config, "is_encoder_decoder", False))
    if kind.endswith(CAUSAL):
        return _Labelled(ignore_index, ahead=1)
    if kind.endswith(BY_TOKEN) or seq2seq:
        return _Labelled(ignore_index)
    if kind.endswith(BY_SAMPLE):
        problem = getattr(config, "problem_type", None)
        if problem is None:  # as transformers has it until it has seen labels
            problem = "regression" if getattr(config, "num_labels", 2) == 1 else "single_label_classification"
        if problem == "single_label_classification":
            return _Labelled(ignore_index)
        if problem in BY_PROBLEM:
            return BY_PROBLEM[problem]()
    raise ValueError(
        f"model should be one of transformers' for causal or masked language modelling, token or sequence "
        f"classification, but is: {type(model).__name__}; give FishLeg a likelihood= of your own, or draw= and nll="
    )


def _kind(model: nn.Module) -> str:
    """The class's own name, or its base's, where that tells of the head."""
    known = (*CAUSAL, *BY_TOKEN, *BY_SAMPLE, "ForConditionalGeneration")
    return next((c.__name__ for c in type(model).__mro__ if c.__name__.endswith(known)), type(model).__name__)


class _Labelled(CategoricalLikelihood):
    """Classes last, and the targets in the model's inputs, those of each position ``ahead`` of it."""

    def __init__(self, ignore_index: int, ahead: int = 0) -> None:
        super().__init__(-1, ignore_index, loss_mask=partial(_counted, ignore_index, ahead))
        self._ahead = ahead

    def targets_in(self, args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
        return _moved(kwargs.get("labels"), self._ahead, self.ignore_index)


def _counted(ignore_index: int, ahead: int, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Which positions of the logits have a label, that of the position ``ahead``."""
    moved = _moved(labels, ahead, ignore_index)
    return None if moved is None else moved != ignore_index


def _moved(labels: Tensor | None, ahead: int, fill: int) -> Tensor | None:
    """The labels of the positions that are ``ahead``, and ``fill`` where there are none."""
    if labels is None or not ahead:
        return labels
    return torch.cat([labels[..., ahead:], torch.full_like(labels[..., :ahead], fill)], dim=-1)


class TrainerOptimizer:
    """Makes a FishLeg of a model, as transformers' Trainer asks a factory to: ``TrainerOptimizer()(model, **options)``.

    ``options`` are FishLeg's, without which the likelihood is ``likelihood_of(model)`` and, with several processes, the
    curvature is averaged over all of them.
    """

    def __call__(self, model: nn.Module, **options: Any) -> FishLeg:
        if "likelihood" not in options and "nll" not in options:
            options["likelihood"] = likelihood_of(model)
        if dist.is_available() and dist.is_initialized():  # the Trainer wraps the model later
            options.setdefault("process_group", dist.group.WORLD)
        return FishLeg(model, **options)
