"""How many operations a step of many equal layers takes, as benchmarks/cpu/op_counts.py counts them."""

from __future__ import annotations

import pytest

from benchmarks.cpu import op_counts

LEARNED = op_counts.STEPS["λ update and anchoring"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("normalize", ["rms", "spectral"])
def test_an_ordinary_step_of_a_hundred_layers(normalize: str, bias: bool) -> None:
    found = op_counts.counts(op_counts.trained(100, 8, bias, normalize=normalize), 2)
    assert found.own.total() <= 150 and found.passes.total() == 0 == found.waits


def test_a_step_that_learns_and_anchors() -> None:
    """A hundred layers; a layer more adds the column of ones that its bias sees."""
    few, many = (op_counts.counts(op_counts.trained(layers, 8, True), LEARNED) for layers in (10, 100))
    assert many.own.total() <= 600 and many.own.total() - few.own.total() <= 2 * 90
    assert many.passes["aten.mm.default"] > 100 and many.waits <= 2


def test_reads_of_the_device_are_counted() -> None:
    optimizer = op_counts.trained(3, 8, False)
    step = optimizer._ops.theta_step
    optimizer._ops = type("Ops", (), {**vars(optimizer._ops)})
    optimizer._ops.theta_step = staticmethod(lambda *args: (bool((found := step(*args))[1]), found)[1])
    assert op_counts.counts(optimizer, 2).waits == 1
