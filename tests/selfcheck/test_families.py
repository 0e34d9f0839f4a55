"""Ops of several backends together, and what a check compares of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fishleg_fast.backends import reference
from fishleg_fast.backends.protocol import LambdaOptions, Ops, ThetaOptions
from fishleg_fast.selfcheck import cases
from fishleg_fast.selfcheck.families import FAMILIES, ComposedOps, composed, shape_class, the_same
from support.blocks import make_blocks
from support.dense import randn
from support.faulty_ops import Faulty

CPU = torch.device("cpu")


def test_each_family_of_composed_ops_is_its_own_backends() -> None:
    """Of two that differ in every op, and in normalize="spectral" from the other θ steps."""
    calls: list[tuple[str, ...]] = []

    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getattr__(self, op: str):
            return lambda *args: calls.append((self.name, op)) or getattr(reference, op)(*args)

    backends = {"a": Named("a"), "b": Named("b")}
    for family, op in FAMILIES.items():
        ops = ComposedOps({f: the_same("b" if f == family else "a") for f in FAMILIES}, backends)
        calls.clear()
        blocks, xs = make_blocks(), [randn(*b.shape, dtype=torch.float64) for b in make_blocks()]
        with torch.no_grad():
            ops.refresh(blocks), ops.qv(blocks, xs), ops.inner(xs, xs)
            ops.lambda_step(blocks, xs, xs, xs, LambdaOptions(damping=0.1, lr=1e-3))
            for rule in ("rms", "spectral"):
                ops.theta_step(blocks, [b.matrix(b.grads) for b in blocks], ThetaOptions(normalize=rule))
        b = [(name, op) for name, op in calls if name == "b"]
        assert b == [("b", op)] and len(calls) == len(FAMILIES)
    assert ops.start_kfac is reference.start_kfac and ops.average_moments is reference.average_moments
    assert ops.natural_step is reference.natural_step


def test_a_shape_class_is_that_of_the_largest_products() -> None:
    class Sized:
        def __init__(self, m: int, n: int) -> None:
            self.shape = (m, n)

    lists = {"small": [(256, 9000), (3, 4)], "medium": [(257, 300), (1, 1)], "large": [(2, 2), (1025, 4096)]}
    assert {kind: shape_class([Sized(*s) for s in shapes]) for kind, shapes in lists.items()} == {k: k for k in lists}
    assert shape_class([]) == "small"
    ones = {family: the_same("a") for family in FAMILIES}
    assert composed(ones, {"a": reference}) is reference


def found(ops: Ops, families: list[str]) -> dict[str, list[Tensor]]:
    case = cases.TINY["grouped"]
    return cases.exercise(case, cases.Draws(CPU), torch.float64, ops, "highest", families)


def test_a_family_is_the_same_whichever_others_are_asked_for() -> None:
    every = found(reference, list(FAMILIES))
    assert list(every) == list(FAMILIES) and all(every.values())
    for family in FAMILIES:
        alone = found(reference, [family])
        assert list(alone) == [family] and all(map(torch.equal, alone[family], every[family]))


def scaled(op: str, change: float) -> Faulty:
    """The reference with one op's effect on what it writes, or its result, off by a part of itself."""

    def wrong(blocks, *args):
        written = [part.param for b in blocks for part in b.parts] + [
            t for b in blocks for t in b.structure.fishleg_aux.values()
        ]  # fmt: skip
        before = [t.detach().clone() for t in written]
        result = getattr(reference, op)(blocks, *args)
        for t, old in zip(written, before, strict=True):
            t.detach().add_(t.detach() - old, alpha=change)
        return result

    def wrong_refresh(blocks, applications=None):
        reference.refresh(blocks, applications)
        for b in blocks:
            for t in b.structure.cache.values():
                t.mul_(1 + change)

    results = {
        "qv": lambda blocks, us: [v * (1 + change) for v in reference.qv(blocks, us)],
        "inner": lambda xs, ys: reference.inner(xs, ys) * (1 + change),
        "refresh": wrong_refresh,
    }
    return Faulty(**{op: results.get(op, wrong)})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_that_is_off_by_one_percent_is_wrong(family: str) -> None:
    want, limit = found(reference, [family])[family], cases.limit(family, "highest", torch.float32)
    got = found(scaled(FAMILIES[family], 0.01), [family])[family]
    assert limit < 0.5 * cases.relative(got, want) < 0.1
    assert cases.relative(found(scaled(FAMILIES[family], 0.0), [family])[family], want) < 1e-12


def test_limits_follow_what_numbers_are_in() -> None:
    limit = cases.limit
    assert limit("qv", "highest", torch.bfloat16) < limit("theta_step", "highest", torch.bfloat16) < 0.1
    assert limit("inner", "medium", torch.float32) == limit("qv", "highest", torch.float32)
    assert cases.relative([torch.tensor(1.0)], []) == cases.relative([torch.tensor(float("nan"))], [torch.ones(())])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_reference_is_right_whatever_parameters_are_in(dtype: torch.dtype) -> None:
    want = found(reference, list(FAMILIES))
    got = cases.exercise(cases.TINY["grouped"], cases.Draws(CPU), dtype, reference, "highest", list(FAMILIES))
    for family, exact in want.items():
        assert cases.relative(got[family], exact) <= 0.5 * cases.limit(family, "highest", dtype), family
