"""Plans of the Triton backend: whatever of a block changes between steps, kernels are told of it; none is launched."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")
from fishleg_fast import DiagKron, Diagonal, Kron
from fishleg_fast.backends.protocol import LambdaOptions, ThetaOptions
from fishleg_fast.kernels import backend
from fishleg_fast.kernels.host.state import TritonState
from fishleg_fast.model.block import Block
from fishleg_fast.model.gradients import GradientInPlace
from support.blocks import make_block
from support.dense import randn
from support.triton_rows import F, K, address, hyperparameters, recorded

pytestmark = pytest.mark.usefixtures("no_grad")


def blocks_of(on_device: bool) -> list[Block]:
    """A layer with a bias, a square one without, one with outer diagonals, a norm; ``on_device``: counted there."""
    o = {"dtype": torch.float32}
    made = [
        make_block(Kron(6, 9, **o), [randn(6, 8).float(), randn(6).float()]),
        make_block(Kron(8, 8, **o), [randn(8, 8).float()]),
        make_block(DiagKron(5, 4, **o), [randn(5, 4).float()]),
        make_block(Diagonal((7, 1), **o), [randn(4).float(), randn(3).float()], 0),
    ]
    for b in made:
        b.allocate(on_device)
        b.grads = [torch.randn_like(part.param) for part in b.parts]
    return made


def groups_told(block: Block, part: int) -> dict[str, float]:
    """What a row of the block is told, by its groups; ``part``: the row's last."""
    group, lr = block.groups[part], block.groups[part]["lr"]
    beta = block.groups[0]["beta"]
    return {
        "KEEP": beta, "RATE": 1 - beta, "BIAS_LR": 0.0 if isinstance(lr, Tensor) else lr,
        "BIAS_DECAY": group["weight_decay"], "BASE_LR_SQUARED": block.groups[0]["base_lr"] ** 2,
    }  # fmt: skip


def check_theta(blocks: list[Block], options: ThetaOptions) -> None:
    """A θ step: every row says what is true now."""
    before = [float(b.step) for b in blocks]
    with recorded() as seen:
        backend.theta_step(blocks, [GradientInPlace(b) for b in blocks], options)
    updates = [launch for launch in seen if launch.kernel == "update_kernel"]
    found: dict[int, list[dict[str, int]]] = {}
    for launch in updates:
        for row in launch.rows():
            found.setdefault(row["INDEX"], []).append(row)
    assert sorted(found) == list(range(len(blocks)))
    precisions = {launch.constants["PRECISION"] for launch in seen if launch.kernel == "right_kernel"}
    assert precisions == {b.structure.precision for b in blocks if not isinstance(b.structure, Diagonal)}
    for index, block in enumerate(blocks):
        rows, aux = found[index], block.structure.fishleg_aux
        assert rows[0]["A"] == address(aux.get("A", aux.get("d"))), "outer diagonal"
        assert rows[0]["X"] == block.momentum.data_ptr()
        assert all(r["STEP"] == (block.step.data_ptr() if options.capturable else 0) for r in rows)
        flat = options.normalize == "spectral" and block.flattened
        assert all((r["POLAR"] != 0) == flat for r in rows)
        assert rows[0]["ENTRIES"] == (max(block.shape) if flat else math.prod(block.shape))
        moved = [part.param if g is not None else None for part, g in zip(block.parts, block.grads, strict=True)]
        if block.axis == 1:
            weight, bias = (*moved, None)[:2]
            grad, bias_grad = (*block.grads, None)[:2]
            (row,) = rows
            assert (row["WEIGHT"], row["BIAS"]) == (address(weight), address(bias))
            assert (row["GRAD"], row["BIAS_GRAD"]) == (address(grad), address(bias_grad))
            for t, name in ((weight, "WEIGHT"), (grad, "GRAD")):
                if t is not None:
                    inner, outer, step = row[f"{name}_INNER"], row[f"{name}_OUTER"], row[f"{name}_STEP"]
                    at = [
                        r * row[f"{name}_ROW"] + c // inner * outer + c % inner * step for r in (0, 2) for c in (0, 3)
                    ]
                    assert at == [r * t.stride(0) + c * t.stride(1) for r in (0, 2) for c in (0, 3)]
        else:
            assert [r["GRAD"] for r in rows] == [address(g) for g in block.grads]
            assert [r["WEIGHT"] for r in rows] == [address(t) for t in moved]
            sizes = [0, *(part.param.numel() for part in block.parts)]
            assert [r["X"] for r in rows] == [block.momentum.data_ptr() + 4 * k for k in sizes[: len(rows)]]
        for number, row in enumerate(rows):
            part = len(block.parts) - 1 if block.axis == 1 else number
            told = hyperparameters(row)
            want = groups_told(block, part)
            if not options.capturable:
                want["CORRECTION"] = 1 - block.beta ** (before[index] + 1)
            assert {k: told[k] for k in want} == pytest.approx(want, rel=1e-6)
            lr = block.groups[part]["lr"]
            assert row["BIAS_LR" if block.axis == 1 and len(block.parts) > 1 else "LR"] == (
                lr.data_ptr() if isinstance(lr, Tensor) else 0
            )


def _replace_lambda(name: str) -> Callable[[list[Block]], None]:
    def change(blocks: list[Block]) -> None:
        for b in blocks:
            if name in (aux := b.structure.fishleg_aux):
                aux[name] = aux[name].clone()

    return change


def _param(change: Callable[[Tensor], Tensor]) -> Callable[[list[Block]], None]:
    def apply(blocks: list[Block]) -> None:
        p = blocks[1].parts[0].param
        p.data = change(p.data)

    return apply


def _grad(change: Callable[[Tensor], Tensor | None], part: int = 0) -> Callable[[list[Block]], None]:
    def apply(blocks: list[Block]) -> None:
        for b in blocks[:2]:
            b.grads = [change(g) if k == part else g for k, g in enumerate(b.grads)]

    return apply


def _group(**values: object) -> Callable[[list[Block]], None]:
    def apply(blocks: list[Block]) -> None:
        for b in blocks[::2]:
            b.groups[0].update(values)

    return apply


def _each(name: str, change: Callable[[Block], object]) -> Callable[[list[Block]], None]:
    def apply(blocks: list[Block]) -> None:
        for b in blocks[::2]:
            setattr(b, name, change(b))

    return apply


def _precision(blocks: list[Block]) -> None:
    for b in blocks:
        b.structure.precision = "tf32"


def _in_place(blocks: list[Block]) -> None:
    for b in blocks[1:3]:
        b.step.add_(5)
        b.momentum.data = b.momentum.data.clone()


def _other_lr(blocks: list[Block]) -> None:
    for b in blocks:
        b.groups = [{**g, "lr": torch.tensor(0.3)} for g in b.groups]


CHANGES: dict[str, Callable[[list[Block]], None]] = {
    "momentum by assignment": _each("momentum", lambda b: b.momentum.clone()),
    "A": _replace_lambda("A"),
    "B": _replace_lambda("B"),
    "d": _replace_lambda("d"),
    "L": _replace_lambda("L"),
    "a parameter's place": _param(torch.clone),
    "a parameter's strides alone": _param(torch.t),
    "a parameter's dtype": _param(lambda p: p.bfloat16()),
    "a gradient's place": _grad(torch.clone),
    "a gradient's strides": _grad(lambda g: g.t().contiguous().t()),
    "gradients' dtype": lambda blocks: [setattr(b, "grads", [g.bfloat16() for g in b.grads]) for b in blocks[1:]],
    "a missing gradient": _grad(lambda g: None),
    "a bias without gradient": _grad(lambda g: None, part=1),
    "lr": _group(lr=0.7),
    "a tensor lr": _group(lr=torch.tensor(0.2)),
    "another tensor lr": _other_lr,
    "weight decay": _group(weight_decay=0.2),
    "beta": _group(beta=0.7),
    "groups by assignment": _each("groups", lambda b: [{**g, "lr": 0.9} for g in b.groups]),
    "a counter by assignment": _each("step", lambda b: b.step + 3),
    "counters written to": _in_place,
    "precision": _precision,
    "spectral": _each("spectral", lambda b: False),
}


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("what", CHANGES)
def test_a_theta_step_follows(what: str, capturable: bool) -> None:
    blocks = blocks_of(capturable)
    options = ThetaOptions(normalize="spectral", capturable=capturable)
    for _ in range(2):
        check_theta(blocks, options)
    CHANGES[what](blocks)
    for _ in range(2):
        check_theta(blocks, options)


def test_lists_and_orders_in_turn() -> None:
    """Blocks that come and go, and change places; counters differ then."""
    blocks = blocks_of(False)
    for chosen in ([0, 1, 2, 3], [1, 2], [3, 0], [2, 1], [0, 1, 2, 3], [1, 2], [3, 2, 1, 0]):
        check_theta([blocks[i] for i in chosen], ThetaOptions())
    assert [int(b.step) for b in blocks] == [4, 6, 6, 4]


def test_a_plan_is_used_again() -> None:
    """With gradients elsewhere at every step, and other hyperparameters."""
    blocks = blocks_of(False)
    known = blocks[0].kept(TritonState).plans
    check_theta(blocks, ThetaOptions())
    first = list(known)
    for _ in range(5):
        check_theta(blocks, ThetaOptions())
        assert known == first and len(first) == 1
        for b in blocks:
            b.grads = [g.clone() for g in b.grads]
            b.groups[0]["lr"] *= 0.9


def check_lambda(blocks: list[Block], options: LambdaOptions) -> None:
    """A λ step of new vectors."""
    scales = [torch.tensor(float(k)) for k in range(len(blocks))]
    us = [GradientInPlace(b, s) for b, s in zip(blocks, scales, strict=True)]
    vs, fvs = ([randn(*b.shape).float() for b in blocks] for _ in range(2))
    counts = [float(b.aux_step) for b in blocks]
    with recorded() as seen:
        backend.lambda_step(blocks, us, vs, fvs, options)
    rows: dict[int, dict[str, int]] = {}
    for launch in seen:
        if launch.kernel in ("products_kernel", "diagonal_sums_kernel"):
            rows.update({r["INDEX"]: r for r in launch.rows() if r["FIRST"]})
    assert sorted(rows) == list(range(len(blocks)))
    for i, b in enumerate(blocks):
        assert (rows[i]["V"], rows[i]["X"]) == (vs[i].data_ptr(), fvs[i].data_ptr())
        assert (rows[i]["GRAD"], rows[i]["SCALE"]) == (b.grads[0].data_ptr(), scales[i].data_ptr())
        assert rows[i]["STEP"] == (b.aux_step.data_ptr() if options.capturable else 0)
    (gradients,) = [launch for launch in seen if launch.kernel == "gradients_kernel"]
    want, given = [], []
    for b, t in zip(blocks, counts, strict=True):
        for name in b.structure.fishleg_aux if isinstance(b.structure, Kron) else ():
            places = (b.structure.fishleg_aux[name], b.exp_avg[name], b.exp_avg_sq[name])
            want.append(tuple(x.data_ptr() for x in places))
            given += [1.0, 1.0] if options.capturable else [1 - beta ** (t + 1) for beta in options.betas]
    assert [(r["AUX"], r["AVG"], r["AVG_SQ"]) for r in gradients.rows(K)] == want
    assert gradients.args[2][: len(given)].tolist() == pytest.approx(given, rel=1e-6)
    assert gradients.args[6][0] == pytest.approx(float(options.lr)) and gradients.args[7:9] == options.betas


LEARNING: dict[str, Callable[[list[Block]], None]] = {
    "L": _replace_lambda("L"),
    "R": _replace_lambda("R"),
    "d": _replace_lambda("d"),
    "exp_avg": lambda blocks: [b.exp_avg.update({k: t.clone() for k, t in b.exp_avg.items()}) for b in blocks],
    "exp_avg_sq by assignment": _each("exp_avg_sq", lambda b: {k: t.clone() for k, t in b.exp_avg_sq.items()}),
    "a counter": _each("aux_step", lambda b: b.aux_step + 3),
    "gradients": _grad(torch.clone),
    "a gradient's strides": _grad(lambda g: g.t().contiguous().t()),
}


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("what", LEARNING)
def test_a_lambda_step_follows(what: str, capturable: bool) -> None:
    blocks = [b for b in blocks_of(capturable) if not isinstance(b.structure, DiagKron)]
    for lr in (0.1, 0.2):
        check_lambda(blocks, LambdaOptions(0.1, lr, capturable=capturable))
    LEARNING[what](blocks)
    check_lambda(blocks, LambdaOptions(0.1, 0.2, capturable=capturable))
    check_lambda(blocks, LambdaOptions(0.3, torch.tensor(0.4), (0.8, 0.9), capturable=capturable))


def test_q_u_follows() -> None:
    """Results are new at every call, and of the gradients of that call."""
    blocks, seen_outs = blocks_of(False), set()
    kept = []
    for _ in range(3):
        for b in blocks:
            b.grads = [g.clone() for g in b.grads]
        kept.append([g for b in blocks for g in b.grads])
        with recorded() as seen:
            vs = backend.qv(blocks, [GradientInPlace(b) for b in blocks])
        kept.append(vs)
        rows = [r for launch in seen if launch.kernel == "right_kernel" and launch.constants["SOURCE"] == "g"
                for r in launch.rows()]  # fmt: skip
        assert [r["OUT"] for r in rows] == [v.data_ptr() for v in vs[:3]]
        assert [r["GRAD"] for r in rows] == [b.grads[0].data_ptr() for b in blocks[:3]]
        assert [tuple(v.shape) for v in vs] == [b.shape for b in blocks]
        out = {v.data_ptr() for v in vs}
        assert not seen_outs & out
        seen_outs |= out


def test_parameters_may_be_rows_of_one() -> None:
    p = nn.Parameter(randn(6, 3).float())
    blocks = [make_block(Kron(3, 3, dtype=torch.float32), [randn(3, 3).float()]) for _ in range(2)]
    for k, b in enumerate(blocks):
        b.parts[0].param, b.parts[0].rows = p, slice(3 * k, 3 * k + 3)
    for _ in range(2):
        with recorded() as seen:
            backend.theta_step(blocks, [GradientInPlace(b) for b in blocks], ThetaOptions())
        rows = seen[-1].rows(F)
        assert [r["WEIGHT"] for r in rows] == [p.data_ptr(), p.data_ptr() + 36]
        p.data = p.data.clone()
