"""The λ step by the Triton kernels, interpreted: test_triton.py runs this file with TRITON_INTERPRET=1."""

from __future__ import annotations

import math

import pytest
import torch

from fishleg_fast.backends import reference as steps
from fishleg_fast.backends.protocol import LambdaOptions
from fishleg_fast.kernels import backend
from fishleg_fast.model.gradients import GradientInPlace
from support.blocks import assert_same, everything
from support.dense import relative
from support.triton_blocks import (
    CLOSE,
    NAN,
    all_blocks,
    assert_learned,
    aux_inputs,
    backend_kind,
    dense_qv,
    kron_blocks,
    pair,
)

pytestmark = pytest.mark.usefixtures("interpreter_of_numpy_2_4", "poisoned")


@pytest.mark.parametrize(
    ("whole", "capturable", "learn_scale", "precondition"),
    [(True, False, True, False), (False, True, False, False), (True, True, False, True), (False, False, True, True)],
)
def test_lambda_step(whole: bool, capturable: bool, learn_scale: bool, precondition: bool, launches: list[str]) -> None:
    """Two steps against float64, whose λ is set to ours in between: Adam amplifies what differs where ∂λ vanishes."""
    exact, ours = pair(all_blocks if whole else lambda dtype, **o: kron_blocks(dtype, scaled=False, **o))
    options = {"damping": 0.1, "lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-4, "capturable": capturable}
    options |= {"precondition": precondition, "learn_scale": learn_scale}
    for step in (1, 2):
        us, vs, fvs = aux_inputs(exact, step)
        before = [{k: t.clone() for k, t in b.structure.fishleg_aux.items()} for b in ours]
        wide = [[x.double() for x in xs] for xs in (us, vs, fvs)]
        want, _ = steps.lambda_step(exact, *wide, LambdaOptions(**options))
        backend.refresh(ours)
        launches.clear()
        versions = [b.structure.version for b in ours]
        loss, ok = backend.lambda_step(ours, us, vs, fvs, LambdaOptions(**options))
        assert ok and relative(loss, want) <= CLOSE
        assert all(b.aux_step == step and b.structure.version != v for b, v in zip(ours, versions, strict=True))
        assert_learned(exact, ours, before)
    assert len(launches) == 4 + 2 * whole + 2 * precondition + (not learn_scale), launches
    launches.clear()
    for b in (b for b in ours if backend_kind(b) == "kron"):  # P and S are those of the new λ, and known to be
        assert relative(b.structure.Qv(us[0].new_ones(b.shape)), dense_qv(b, us[0].new_ones(b.shape))) <= CLOSE
    backend.refresh([b for b in ours if "A" not in b.structure.fishleg_aux])
    assert launches == []


@pytest.mark.parametrize(
    ("where", "capturable"), [("u", False), ("fv", True), ("reference", False), ("overflow", True), ("zero", False)]
)
def test_lambda_step_refuses(where: str, capturable: bool) -> None:
    """What is not finite, or a zero direction, writes nothing, P and S included."""
    exact, blocks = pair(all_blocks)
    us, vs, fvs = aux_inputs(exact, 1)
    if where == "zero":
        us = [torch.zeros_like(u) for u in us]
    if where == "overflow":
        us, vs, fvs = ([x * 1e20 for x in xs] for xs in (us, vs, fvs))
    if where == "u":
        us[0][0, 0] = NAN
    if where == "fv":
        fvs[6][0] = math.inf
    if where == "reference":
        fvs[-1][0] = math.inf
    before = everything(blocks)
    _, ok = backend.lambda_step(blocks, us, vs, fvs, LambdaOptions(damping=0.1, lr=0.1, capturable=capturable))
    assert not ok
    assert_same(before, blocks)
    x = torch.ones(blocks[0].shape)
    assert relative(blocks[0].structure.Qv(x), dense_qv(blocks[0], x)) <= CLOSE


def test_split_directions() -> None:
    """u as the optimizer hands it over: the gradient where the parameters hold it, times a device scalar."""
    exact, ours = pair(lambda dtype, **o: kron_blocks(dtype, scaled=False, **o))
    c = torch.tensor(0.1)
    us = [c * b.matrix(b.grads) for b in ours]
    vs = [v.float() for v in steps.qv(exact, [u.double() for u in us])]
    options = {"damping": 0.3, "lr": 0.01, "eps": 1e-4}
    steps.lambda_step(
        exact, [u.double() for u in us], [v.double() for v in vs], [v.double() for v in vs], LambdaOptions(**options)
    )
    backend.lambda_step(ours, [GradientInPlace(b, c) for b in ours], vs, vs, LambdaOptions(**options))
    for a, b in zip(exact, ours, strict=True):
        for name, t in b.structure.fishleg_aux.items():
            assert relative(t, a.structure.fishleg_aux[name]) <= CLOSE


@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.parametrize("groups", ["two dtypes of gradients", "two precisions"])
def test_groups_of_launches_share_one_scale(groups: str, precondition: bool, launches: list[str]) -> None:
    """Without learn_scale w needs the sums over all blocks, whichever launches they are in."""
    exact, ours = pair(lambda dtype, **o: kron_blocks(dtype, scaled=False, **o))
    us, vs, fvs = aux_inputs(exact, 1)
    if groups == "two precisions":
        for block in ours[:2]:
            block.structure.precision = "tf32x3"
    else:
        us = [u.bfloat16() if k < 2 else u for k, u in enumerate(us)]
    before = [{k: t.clone() for k, t in b.structure.fishleg_aux.items()} for b in ours]
    options = {"damping": 0.1, "lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-4, "learn_scale": False}
    options |= {"precondition": precondition}
    wide = [[x.double() for x in xs] for xs in (us, vs, fvs)]
    want, _ = steps.lambda_step(exact, *wide, LambdaOptions(**options))
    backend.refresh(ours)
    launches.clear()
    loss, ok = backend.lambda_step(ours, us, vs, fvs, LambdaOptions(**options))
    assert ok and relative(loss, want) <= CLOSE
    assert launches.count("products_kernel") == 4 + 2 * precondition  # two groups
    assert_learned(exact, ours, before)
