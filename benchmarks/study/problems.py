"""The problems of the studies: what is trained, for how many steps, and by which figure it is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.train.training import Problem


@dataclass(frozen=True)
class StudyProblem:
    """A problem with its schedule.

    `figure` is the key of a record that runs are judged by. An lr whose figure with the first seed is worse than
    the best one's by more than `margin` is not tried with the other tuning seeds.
    """

    title: str
    make: Callable[[], Problem]
    batch: int
    steps: int
    margin: float
    warmup: int = 0
    figure: str = "train nll"
    figure_name: str = "final training NLL"
    sample: int | None = None  # training examples of one evaluation in the study of seconds; None: all


@cache
def curves() -> Problem:
    """The CURVES autoencoder; made once, whatever the batch size."""
    from benchmarks.train.train_autoencoder import autoencoder_problem

    return autoencoder_problem("curves")


@cache
def gpt() -> Problem:
    """A small GPT on Python's help texts."""
    from benchmarks.train.train_gpt import gpt_problem

    return gpt_problem()


@cache
def resnet() -> Problem:
    """A narrow ResNet18 on scikit-learn's digits."""
    from benchmarks.train.train_resnet import resnet_problem

    return resnet_problem()


@cache
def mlp() -> Problem:
    """A wide MLP on Python's help texts."""
    from benchmarks.train.train_mlp import mlp_problem

    return mlp_problem()


PROBLEMS = {
    "curves-1000": StudyProblem("CURVES autoencoder, batch 1000", curves, 1000, 500, margin=0.05),
    "curves-100": StudyProblem("CURVES autoencoder, batch 100", curves, 100, 1000, margin=0.05),
    "gpt": StudyProblem(
        "GPT on Python's help texts, batch 16", gpt, 16, 300, margin=0.05, warmup=20,
        figure="last 50 loss", figure_name="mean training NLL of the last 50 steps", sample=128,
    ),
    "resnet": StudyProblem("ResNet18 on digits, batch 128", resnet, 128, 100, margin=1.0),
    "mlp": StudyProblem(
        "wide MLP on Python's help texts, batch 256", mlp, 256, 400, margin=0.05,
        figure="last 50 loss", figure_name="mean training NLL of the last 50 steps", sample=8192,
    ),
}  # fmt: skip
