"""The command for a GPU: its floors, opponents, checks and steps compute what they say, on the CPU.

Nothing here is about how long anything takes.
"""

import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from dense import randn, relative
from torch.utils.flop_counter import FlopCounterMode

from fishleg_fast import reference
from fishleg_fast.structure import Structure

BENCHMARKS = str(Path(__file__).resolve().parent.parent / "benchmarks")
sys.path.insert(0, BENCHMARKS)  # they import each other by short names, as scripts do
try:
    import gpu_checks
    import gpu_models
    import gpu_ops
    import gpu_plain
    import gpu_report
    import gpu_shapes
    import gpu_steps
    from gpu_measure import Clock
finally:
    sys.path.remove(BENCHMARKS)

CPU = torch.device("cpu")


# ---- floors and opponents


def test_the_lists_are_the_models_blocks():
    def blocks(case):
        opt = gpu_steps.FishLeg(case.make_model(), likelihood=case.make_likelihood())
        return [b.shape for b in opt.blocks if "R" in b.structure.fishleg_aux]

    small = gpu_models.resnet_case(4, 1, 8)
    assert sorted(gpu_shapes.resnet18(4)) == sorted(blocks(small))
    assert gpu_shapes.layers((6, 5, 3)) == blocks(gpu_models.TINY["mnist"])
    layer = blocks(gpu_models.transformer_case(8, 1, 2, 5, 1, 1))[:4]
    assert [(m // 8, n) for m, n in layer] == [
        (m // 768, (n - 1) // 96 + 1) for m, n in gpu_shapes.LISTS["3 transformer layers"][:4]
    ]


SHAPES = [(2, 3), (5, 4)]
ELEMENTWISE = {"qv": 0, "theta_step": 10 * (6 + 20), "lambda_step": 12 * (4 + 9 + 25 + 16)}


@pytest.mark.parametrize("op", ELEMENTWISE)
def test_flops_of_the_floor_are_those_of_the_plain_products(op):
    function, arguments = gpu_ops.plain(op, SHAPES, CPU, "highest")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*arguments)
    assert gpu_shapes.cost(op, SHAPES)[0] == counter.get_total_flops() + ELEMENTWISE[op]


def test_a_refresh_needs_half_of_two_products():
    flops = 0
    for k in (2, 3, 5, 4):  # an entry (i, j ≤ i) is k products and sums
        flops += sum(2 * k for i in range(k) for j in range(i + 1))
    assert gpu_shapes.cost("refresh", SHAPES) == (flops, 4 * 2 * (4 + 9 + 25 + 16))


def test_bytes_of_the_floor():
    factors, block = 4 + 9 + 25 + 16, 6 + 20
    assert gpu_shapes.cost("qv", SHAPES)[1] == 4 * (factors + 2 * block)  # P, S, u; Q u
    assert gpu_shapes.cost("theta_step", SHAPES)[1] == 4 * (factors + 3 * block + 2 * block)  # P, S, g, m, θ; m, θ
    # P, S, u, v, F v, λ and its two moments; λ and its moments
    assert gpu_shapes.cost("lambda_step", SHAPES)[1] == 4 * (factors + 3 * block + 3 * factors + 3 * factors)
    with pytest.raises(ValueError, match="op should be"):
        gpu_shapes.cost("sgd", SHAPES)


def test_the_floor_in_ms_is_the_longer_one():
    results = {"peak/copy": {"bytes/s": 1e3}, "peak/gemm/high": {"flop/s": 1e3}}
    flops, bytes_ = gpu_shapes.cost("qv", [(64, 64)])
    assert flops > bytes_ and gpu_report.floor({"results": results}, "qv", "64", "high") == pytest.approx(flops)
    results["peak/copy"]["bytes/s"] = 1.0
    assert gpu_report.floor({"results": results}, "qv", "64", "high") == pytest.approx(1000 * bytes_)
    assert gpu_report.floor({"results": results}, "qv", "64", "tf32x3") is None


def plain_arguments(bench):
    """A bench's own tensors, copied, as the plain functions take them."""
    aux = [{k: t.clone() for k, t in b.structure.fishleg_aux.items()} for b in bench.blocks]
    cache = [{k: t.clone() for k, t in b.structure.cache.items()} for b in bench.blocks]
    return [a["R"] for a in aux], [a["L"] for a in aux], [c["P"] for c in cache], [c["S"] for c in cache]


@pytest.fixture
def bench():
    with gpu_ops.Bench(SHAPES, CPU, "reference", "highest") as made:
        for group in made.opt.param_groups:
            group["lr"] = 0.1
        yield made


def test_plain_qv_and_refresh_are_the_reference(bench):
    Rs, Ls, Ps, Ss = plain_arguments(bench)
    for got, want in zip(gpu_plain.qv(Ps, bench.us, Ss), bench.qv(), strict=True):
        assert relative(got, want) < 1e-6
    fresh = [[torch.full_like(t, float("nan")) for t in side] for side in (Ps, Ss)]
    gpu_plain.refresh(Rs, Ls, *fresh)
    assert all(relative(a, b) < 1e-6 for a, b in zip(fresh[0] + fresh[1], Ps + Ss, strict=True))


@pytest.mark.parametrize("op", [*ELEMENTWISE, "refresh"])
def test_opponents_of_medium_have_bfloat16_operands_and_float32_results(op):
    function, arguments = gpu_ops.plain(op, SHAPES, CPU, "medium")
    before = [t.clone() for t in gpu_ops._leaves(arguments)]
    with torch.no_grad():
        outputs = function(*arguments)
    assert any(t.dtype == torch.bfloat16 for t in before)
    if op == "qv":
        Ps, us, Ss = arguments
        for got, P, u, S in zip(outputs, Ps, us, Ss, strict=True):
            assert got.dtype == torch.float32
            assert 1e-5 < relative(got, P.double() @ u.double() @ S.double()) < 2e-2
    elif op != "refresh":
        assert any(not torch.equal(a, b) for a, b in zip(before, gpu_ops._leaves(arguments), strict=True))
    assert all(t.isfinite().all() for t in gpu_ops._leaves(arguments))


def test_the_plain_theta_step_is_the_reference(bench):
    _, _, Ps, Ss = plain_arguments(bench)
    thetas = [[b.parts[0].param.detach().clone()] for b in bench.blocks]
    grads = [[b.grads[0].clone()] for b in bench.blocks]
    momenta = [torch.zeros(s) for s in SHAPES]
    before = [t[0].clone() for t in thetas]
    for step in (1, 2):
        bench.theta_step()
        correction = torch.tensor(1 - gpu_plain.BETA ** (step + 1))
        gpu_plain.theta_step(thetas, grads, momenta, Ps, Ss, correction, 0.1)
    for block, (theta,), old, m in zip(bench.blocks, thetas, before, momenta, strict=True):
        assert relative(theta - old, block.parts[0].param.detach() - old) < 1e-5
        assert relative(m, block.momentum) < 1e-6


def test_the_plain_lambda_step_is_the_reference(bench, monkeypatch):
    monkeypatch.setattr(gpu_ops, "LR", 0.1)
    Rs, Ls, Ps, Ss = plain_arguments(bench)
    before = [t.clone() for t in Rs + Ls]
    moments = [[torch.zeros_like(x) for x in (R, R, L, L)] for R, L in zip(Rs, Ls, strict=True)]
    for block in bench.blocks:
        block.structure.refresh()
    bench.lambda_step()
    step = torch.zeros(())
    gpu_plain.lambda_step(Rs, Ls, Ps, Ss, moments, bench.us, bench.vs, bench.fvs, step, gpu_ops.DAMPING, 0.1)
    want = [b.structure.fishleg_aux[n] for n in "RL" for b in bench.blocks]
    for got, end, old in zip(Rs + Ls, want, before, strict=True):
        assert relative(got - old, end - old) < 1e-4
    for mine, block in zip(moments, bench.blocks, strict=True):
        assert relative(mine[1], block.exp_avg_sq["R"]) < 1e-4 and relative(mine[2], block.exp_avg["L"]) < 1e-4


def test_a_refresh_that_is_timed_computes(bench, monkeypatch):
    calls = []
    real = Structure._factors_as_operands
    monkeypatch.setattr(Structure, "_factors_as_operands", lambda self: calls.append(1) or real(self))
    bench.refresh()
    bench.refresh()
    assert len(calls) == 2 * len(SHAPES)


def test_an_op_that_raises_leaves_nothing_switched_behind(monkeypatch):
    def raises(*args):
        raise RuntimeError("no kernel image")

    settings = torch.is_grad_enabled(), torch.get_float32_matmul_precision()
    monkeypatch.setattr(reference, "refresh", raises)
    with pytest.raises(RuntimeError, match="no kernel image"):
        gpu_ops.backend_task(Clock(CPU, 0.0), "qv", SHAPES, "reference", "high")
    assert (torch.is_grad_enabled(), torch.get_float32_matmul_precision()) == settings


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_an_opponent_is_compiled_at_a_precision_that_inductor_can_read(monkeypatch, precision):
    seen = []

    def compiled(function, mode, compiler):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32))
        return function

    monkeypatch.setattr(gpu_plain, "compiled", compiled)
    gpu_ops.compiled_task(Clock(CPU, 0.0), "qv", SHAPES, precision, None, "inductor")
    assert seen == [("highest", False) if precision == "highest" else ("high", True)]
    assert torch.get_float32_matmul_precision() == "highest"


# ---- checks and steps


def wrong(op, change):
    """The reference with one op's results changed."""

    class Wrong:
        def __getattr__(self, name):
            return getattr(reference, name)

    ops = Wrong()
    setattr(ops, op, change(getattr(reference, op)))
    return ops


def errors_of(ops):
    make = partial(gpu_checks.optimizer, 1, CPU, structure="kron")
    ours = make(torch.float32, backend="reference", precision="highest")
    truth = make(torch.float64, backend="reference", precision="highest")
    got, want = gpu_checks.run(ours, ops), gpu_checks.run(truth, reference)
    return {q: gpu_checks.relative(got[q], want[q]) for q in gpu_checks.QUANTITIES}


def test_the_check_finds_what_is_wrong():
    limit = gpu_checks.LIMITS["highest"]
    assert max(errors_of(reference).values()) < limit
    off = errors_of(wrong("qv", lambda qv: lambda bs, us: [1.001 * v for v in qv(bs, us)]))
    assert off["qv"] > limit > off["refresh"]
    nan = errors_of(wrong("qv", lambda qv: lambda bs, us: [v / 0 * 0 for v in qv(bs, us)]))
    assert nan["qv"] == float("inf")
    half = errors_of(wrong("lambda_step", lambda f: lambda *a, damping, **o: f(*a, damping=2 * damping, **o)))
    assert half["lambda"] > limit > half["qv"]
    plain = errors_of(wrong("theta_step", lambda f: lambda *a, nesterov: f(*a, nesterov=False)))
    assert plain["theta"] > limit > plain["lambda"]
    lazy = errors_of(wrong("theta_step", lambda f: lambda *a, **o: None))
    assert lazy["theta"] == pytest.approx(1)


@pytest.mark.parametrize("case", gpu_models.TINY)
def test_models_can_be_stepped_without_a_warning(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of a ggn that forward mode fails
        training = gpu_steps.Training(Clock(CPU, 0.0), gpu_models.TINY[case], "reference", "highest")
        figures = training.cycle()
    training.finish()
    assert set(figures) == {"whole", "passes", "step", "ordinary", "aux", "anchor"}
    assert training.opt.diagnostics()["aux_steps"] == 1 and training.opt.diagnostics()["anchors"] == 1


def test_the_transformer_is_causal():
    model = gpu_models.transformer(8, 2, 2, 5).double()
    x = randn(1, 4, 8)
    y = x.clone()
    y[:, 3] = randn(8, seed=1)
    a, b = model(x), model(y)
    assert torch.equal(a[:, :3], b[:, :3]) and not torch.allclose(a[:, 3], b[:, 3])


def test_the_published_way_is_timed_as_it_is():
    """One θ step of it: its own function, with λ that is not the identity, and nothing else in the call."""
    fn = gpu_steps._theta(gpu_models.TINY["mnist"], CPU, "published", "highest", False)
    assert fn.__func__ is gpu_steps.Published.theta_step
    layer = fn.__self__.layers[0]
    assert not torch.equal(layer.R, torch.eye(len(layer.R)))
    assert fn.__self__.steps == 0  # no λ update has run
