"""The likelihoods, each with a shape of outputs."""

from __future__ import annotations

from fishleg_fast.likelihoods import BernoulliLikelihood, CategoricalLikelihood, GaussianLikelihood

CASES = {  # kind: (likelihood, outputs' shape)
    "gaussian": (GaussianLikelihood, (3, 2)),
    "bernoulli": (BernoulliLikelihood, (3, 2)),
    "categorical": (CategoricalLikelihood, (3, 4)),
    "images": (CategoricalLikelihood, (2, 3, 1, 2)),
    "lm": (lambda: CategoricalLikelihood(class_dim=-1), (2, 2, 3)),
}
