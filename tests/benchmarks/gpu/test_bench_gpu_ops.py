"""The command for a GPU: its floors and opponents compute what they say, on the CPU.

Nothing here is about how long anything takes.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import shapes
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.measurements import models, ops, plain_ops
from benchmarks.gpu.report.lookup import floor
from fishleg_fast import FishLeg
from fishleg_fast.algebra.structures.base import Structure
from fishleg_fast.backends import reference
from support.dense import relative

CPU = torch.device("cpu")


def test_the_lists_are_the_models_blocks():
    def blocks(case):
        opt = FishLeg(case.make_model(), likelihood=case.make_likelihood())
        return [b.shape for b in opt.blocks if "R" in b.structure.fishleg_aux]

    small = models.resnet_case(4, 1, 8)
    assert sorted(shapes.resnet18(4)) == sorted(blocks(small))
    assert shapes.layers((6, 5, 3)) == blocks(models.TINY["mnist"])
    layer = blocks(models.transformer_case(8, 1, 2, 5, 1, 1))[:4]
    assert [(m // 8, n) for m, n in layer] == [
        (m // 768, (n - 1) // 96 + 1) for m, n in shapes.LISTS["3 transformer layers"][:4]
    ]


SHAPES = [(2, 3), (5, 4)]
ELEMENTWISE = {"qv": 0, "theta_step": 10 * (6 + 20), "lambda_step": 12 * (4 + 9 + 25 + 16)}


@pytest.mark.parametrize("op", ELEMENTWISE)
def test_flops_of_the_floor_are_those_of_the_plain_products(op):
    function, arguments = ops.plain(op, SHAPES, CPU, "highest")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*arguments)
    assert shapes.cost(op, SHAPES)[0] == counter.get_total_flops() + ELEMENTWISE[op]


def test_a_refresh_needs_half_of_two_products():
    flops = 0
    for k in (2, 3, 5, 4):  # an entry (i, j ≤ i) is k products and sums
        flops += sum(2 * k for i in range(k) for j in range(i + 1))
    assert shapes.cost("refresh", SHAPES) == (flops, 4 * 2 * (4 + 9 + 25 + 16))


def test_bytes_of_the_floor():
    factors, block = 4 + 9 + 25 + 16, 6 + 20
    assert shapes.cost("qv", SHAPES)[1] == 4 * (factors + 2 * block)  # P, S, u; Q u
    assert shapes.cost("theta_step", SHAPES)[1] == 4 * (factors + 3 * block + 2 * block)  # P, S, g, m, θ; m, θ
    # P, S, u, v, F v, λ and its two moments; λ and its moments
    assert shapes.cost("lambda_step", SHAPES)[1] == 4 * (factors + 3 * block + 3 * factors + 3 * factors)
    with pytest.raises(ValueError, match="op should be"):
        shapes.cost("sgd", SHAPES)


def test_the_floor_in_ms_is_the_longer_one():
    results = {"peak/copy": {"bytes/s": 1e3}, "peak/gemm/high": {"flop/s": 1e3}}
    flops, bytes_ = shapes.cost("qv", [(64, 64)])
    assert flops > bytes_ and floor({"results": results}, "qv", "64", "high") == pytest.approx(flops)
    results["peak/copy"]["bytes/s"] = 1.0
    assert floor({"results": results}, "qv", "64", "high") == pytest.approx(1000 * bytes_)
    assert floor({"results": results}, "qv", "64", "tf32x3") is None


def plain_arguments(bench):
    """A bench's own tensors, copied, as the plain functions take them."""
    aux = [{k: t.clone() for k, t in b.structure.fishleg_aux.items()} for b in bench.blocks]
    cache = [{k: t.clone() for k, t in b.structure.cache.items()} for b in bench.blocks]
    return [a["R"] for a in aux], [a["L"] for a in aux], [c["P"] for c in cache], [c["S"] for c in cache]


@pytest.fixture
def bench():
    with ops.Bench(SHAPES, CPU, "reference", "highest") as made:
        for group in made.opt.param_groups:
            group["lr"] = 0.1
        yield made


def test_plain_qv_and_refresh_are_the_reference(bench):
    Rs, Ls, Ps, Ss = plain_arguments(bench)
    for got, want in zip(plain_ops.qv(Ps, bench.us, Ss), bench.qv(), strict=True):
        assert relative(got, want) < 1e-6
    fresh = [[torch.full_like(t, float("nan")) for t in side] for side in (Ps, Ss)]
    plain_ops.refresh(Rs, Ls, *fresh)
    assert all(relative(a, b) < 1e-6 for a, b in zip(fresh[0] + fresh[1], Ps + Ss, strict=True))


@pytest.mark.parametrize("op", [*ELEMENTWISE, "refresh"])
def test_opponents_of_medium_have_bfloat16_operands_and_float32_results(op):
    function, arguments = ops.plain(op, SHAPES, CPU, "medium")
    before = [t.clone() for t in ops._leaves(arguments)]
    with torch.no_grad():
        outputs = function(*arguments)
    assert any(t.dtype == torch.bfloat16 for t in before)
    if op == "qv":
        Ps, us, Ss = arguments
        for got, P, u, S in zip(outputs, Ps, us, Ss, strict=True):
            assert got.dtype == torch.float32
            assert 1e-5 < relative(got, P.double() @ u.double() @ S.double()) < 2e-2
    elif op != "refresh":
        assert any(not torch.equal(a, b) for a, b in zip(before, ops._leaves(arguments), strict=True))
    assert all(t.isfinite().all() for t in ops._leaves(arguments))


def test_the_plain_theta_step_is_the_reference(bench):
    _, _, Ps, Ss = plain_arguments(bench)
    thetas = [[b.parts[0].param.detach().clone()] for b in bench.blocks]
    grads = [[b.grads[0].clone()] for b in bench.blocks]
    momenta = [torch.zeros(s) for s in SHAPES]
    before = [t[0].clone() for t in thetas]
    for step in (1, 2):
        bench.theta_step()
        correction = torch.tensor(1 - plain_ops.BETA ** (step + 1))
        plain_ops.theta_step(thetas, grads, momenta, Ps, Ss, correction, 0.1)
    for block, (theta,), old, m in zip(bench.blocks, thetas, before, momenta, strict=True):
        assert relative(theta - old, block.parts[0].param.detach() - old) < 1e-5
        assert relative(m, block.momentum) < 1e-6


def test_the_plain_lambda_step_is_the_reference(bench, monkeypatch):
    monkeypatch.setattr(bench, "lambda_options", replace(bench.lambda_options, lr=0.1))
    Rs, Ls, Ps, Ss = plain_arguments(bench)
    before = [t.clone() for t in Rs + Ls]
    moments = [[torch.zeros_like(x) for x in (R, R, L, L)] for R, L in zip(Rs, Ls, strict=True)]
    for block in bench.blocks:
        block.structure.refresh()
    bench.lambda_step()
    step = torch.zeros(())
    plain_ops.lambda_step(Rs, Ls, Ps, Ss, moments, bench.us, bench.vs, bench.fvs, step, ops.DAMPING, 0.1)
    want = [b.structure.fishleg_aux[n] for n in "RL" for b in bench.blocks]
    for got, end, old in zip(Rs + Ls, want, before, strict=True):
        assert relative(got - old, end - old) < 1e-4
    for mine, block in zip(moments, bench.blocks, strict=True):
        assert relative(mine[1], block.exp_avg_sq["R"]) < 1e-4 and relative(mine[2], block.exp_avg["L"]) < 1e-4


def test_a_refresh_that_is_timed_computes(bench, monkeypatch):
    calls = []
    real = Structure._operands
    monkeypatch.setattr(Structure, "_operands", lambda self: calls.append(1) or real(self))
    bench.refresh()
    bench.refresh()
    assert len(calls) == 2 * len(SHAPES)


def test_an_op_that_raises_leaves_nothing_switched_behind(monkeypatch):
    def raises(*args):
        raise RuntimeError("no kernel image")

    settings = torch.is_grad_enabled(), torch.get_float32_matmul_precision()
    monkeypatch.setattr(reference, "refresh", raises)
    with pytest.raises(RuntimeError, match="no kernel image"):
        ops.backend_task(Clock(CPU, 0.0), "qv", SHAPES, "reference", "high")
    assert (torch.is_grad_enabled(), torch.get_float32_matmul_precision()) == settings


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_an_opponent_is_compiled_at_a_precision_that_inductor_can_read(monkeypatch, precision):
    seen = []

    def compiled(function, mode, compiler):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32))
        return function

    monkeypatch.setattr(plain_ops, "compiled", compiled)
    ops.compiled_task(Clock(CPU, 0.0), "qv", SHAPES, precision, None, "inductor")
    assert seen == [("highest", False) if precision == "highest" else ("high", True)]
    assert torch.get_float32_matmul_precision() == "highest"
