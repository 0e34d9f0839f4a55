"""Likelihoods: how a model's outputs are scored, sampled, and measured by their Fisher matrix.

A likelihood's ``nll`` fixes the scale of everything else: the Fisher matrix is that of the same loss, mean and all.
"""

from .base import Likelihood as Likelihood
from .bernoulli import BernoulliLikelihood as BernoulliLikelihood
from .categorical import CategoricalLikelihood as CategoricalLikelihood
from .gaussian import GaussianLikelihood as GaussianLikelihood
