"""The command for a GPU: its checks and steps compute what they say, on the CPU.

Nothing here is about how long anything takes.
"""

import warnings
from dataclasses import replace

import pytest
import torch

from benchmarks.common.published import Published
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.measurements import checks, models, steps
from fishleg_fast.backends import reference
from fishleg_fast.selfcheck.cases import limit
from support.dense import randn

CPU = torch.device("cpu")


def wrong(op, change):
    """The reference with one op's results changed."""

    class Wrong:
        def __getattr__(self, name):
            return getattr(reference, name)

    ops = Wrong()
    setattr(ops, op, change(getattr(reference, op)))
    return ops


def errors_of(ops):
    return checks.errors(CPU, ops, "highest", "kron", 1)


def test_the_check_finds_what_is_wrong():
    most = limit("qv", "highest", torch.float32)
    assert all(e < limit(family, "highest", torch.float32) for family, e in errors_of(reference).items())
    off = errors_of(wrong("qv", lambda qv: lambda bs, us: [1.001 * v for v in qv(bs, us)]))
    assert off["qv"] > most > off["refresh"]
    nan = errors_of(wrong("qv", lambda qv: lambda bs, us: [v / 0 * 0 for v in qv(bs, us)]))
    assert nan["qv"] == float("inf")
    half = errors_of(wrong("lambda_step", lambda f: lambda *a: f(*a[:-1], replace(a[-1], damping=2 * a[-1].damping))))
    assert half["lambda_step"] > most > half["qv"]
    plain = errors_of(wrong("theta_step", lambda f: lambda *a: f(*a[:-1], replace(a[-1], nesterov=False))))
    assert plain["theta_step"] > most > plain["lambda_step"]
    lazy = errors_of(wrong("theta_step", lambda f: lambda *a, **o: None))
    assert lazy["theta_step"] == lazy["spectral"] == pytest.approx(1)


def test_a_check_says_what_is_right():
    found = checks.check_task(CPU, "reference", "high", "diagkron", 1)
    assert found["right"] and set(found["errors"]) == set(found["limits"]) >= {"qv", "spectral"}


@pytest.mark.parametrize("case", models.TINY)
def test_models_can_be_stepped_without_a_warning(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of a ggn that forward mode fails
        training = steps.Training(Clock(CPU, 0.0), models.TINY[case], "reference", "highest")
        figures = training.cycle()
    training.finish()
    assert set(figures) == {"whole", "passes", "step", "ordinary", "aux", "anchor"}
    assert training.opt.diagnostics()["aux_steps"] == 1 and training.opt.diagnostics()["anchors"] == 1


def test_the_transformer_is_causal():
    model = models.transformer(8, 2, 2, 5).double()
    x = randn(1, 4, 8)
    y = x.clone()
    y[:, 3] = randn(8, seed=1)
    a, b = model(x), model(y)
    assert torch.equal(a[:, :3], b[:, :3]) and not torch.allclose(a[:, 3], b[:, 3])


def test_the_published_way_is_timed_as_it_is():
    """One θ step of it: its own function, with λ that is not the identity, and nothing else in the call."""
    fn = steps._theta(models.TINY["mnist"], CPU, "published", "highest", False)
    assert fn.__func__ is Published.theta_step
    layer = fn.__self__.layers[0]
    assert not torch.equal(layer.R, torch.eye(len(layer.R)))
    assert fn.__self__.steps == 0  # no λ update has run
