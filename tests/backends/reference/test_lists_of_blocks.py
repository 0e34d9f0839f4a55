"""Q u, inner products and a refresh of lists of blocks by every backend for CPUs."""

from __future__ import annotations

import pytest

from fishleg_fast.backends import reference as steps  # or the ops of another backend, by each_backend
from support.blocks import gradients, make_blocks
from support.dense import dense_q, relative

pytestmark = pytest.mark.usefixtures("each_backend", "no_grad")


def test_ops_take_lists_of_blocks() -> None:
    blocks = make_blocks()
    us = gradients(blocks, 1)
    for b, u, got in zip(blocks, us, steps.qv(blocks, us), strict=True):
        want = dense_q(b.structure, b.structure.fishleg_aux) @ u.reshape(-1)
        assert relative(got.reshape(-1), want) <= 1e-12
    total = sum((u * u).sum() for u in us)
    assert relative(steps.inner(us, us), total) <= 1e-12
    blocks[0].structure.fishleg_aux["R"].mul_(2)
    steps.refresh(blocks)
    R = blocks[0].structure.fishleg_aux["R"]
    assert relative(blocks[0].structure.cache["P"], R.T @ R) <= 1e-12
