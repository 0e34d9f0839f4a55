"""For models of transformers, which is not imported here: the likelihood whose nll their loss is, and what makes the
optimizer for their Trainer.

    Trainer(model, args, optimizer_cls_and_kwargs=(TrainerOptimizer, {"lr": 2e-2}), ...)
"""

from __future__ import annotations

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
    "single_label_classification": CategoricalLikelihood,
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
        return CategoricalLikelihood(-1, ignore_index, loss_mask=partial(_counted, ignore_index, 1))
    if kind.endswith(BY_TOKEN) or seq2seq:
        return CategoricalLikelihood(-1, ignore_index, loss_mask=partial(_counted, ignore_index, 0))
    if kind.endswith(BY_SAMPLE):
        problem = getattr(config, "problem_type", None)
        if problem is None:  # as transformers has it until it has seen labels
            problem = "regression" if getattr(config, "num_labels", 2) == 1 else "single_label_classification"
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


def _counted(ignore_index: int, ahead: int, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Which positions of the logits have a label, that of the position ``ahead``."""
    if labels is None:
        return None
    counted = labels != ignore_index
    if ahead:
        counted = torch.cat([counted[..., ahead:], torch.zeros_like(counted[..., :ahead])], dim=-1)
    return counted


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
