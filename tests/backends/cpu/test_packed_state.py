"""What packed blocks keep between ops: operands of today's λ, the same bits for all threads."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

from fishleg_fast.backends import cpu
from fishleg_fast.backends.cpu import packed_gradients, packed_matrix, packed_products
from fishleg_fast.backends.cpu.state import packed_operator
from fishleg_fast.backends.protocol import LambdaOptions, ThetaOptions
from fishleg_fast.backends.reference import lambda_update
from fishleg_fast.model.block import Block
from support.blocks import everything, theta
from support.dense import randn, relative
from support.packed_blocks import (
    EACH,
    ERRORS,
    Exact,
    curved,
    directions,
    exact_q,
    mixed,
    needs,
    placed,
    torch_sums_otherwise,
    whole,
)
from support.training import make, state, train

pytestmark = pytest.mark.usefixtures("poisoned")


def run(blocks: list[Block], what: str) -> list[Tensor]:
    """All that one op computes and writes."""
    low_rank, kind = "low-rank" in what, "low-rank F v" if "low-rank" in what else "dense u"
    us = directions(blocks, 33, seed=4, low_rank=low_rank)
    if what.startswith("qv"):
        return [whole(v) for v in cpu.qv(blocks, us)]
    if what.startswith("theta"):
        return [cpu.theta_step(blocks, placed(blocks, us), ThetaOptions())[0], *everything(blocks)]
    vs = us if "given" in what else cpu.qv(blocks, us)  # nothing is packed before the step then
    assert cpu.lambda_step(blocks, us, vs, curved(blocks, kind), LambdaOptions(damping=0.1, lr=0.01))[1]
    return everything(blocks)


PRECISION = {torch.bfloat16: "medium", torch.float32: "highest"}
OPS = ["qv low-rank", "qv dense", "theta low-rank", "theta dense", "lambda low-rank", "lambda dense"]


@EACH
@pytest.mark.parametrize("what", [*OPS, "lambda given dense"])
@pytest.mark.parametrize("name", ["R", "L"])
def test_every_operand_follows_lambda(operands: torch.dtype, name: str, what: str) -> None:
    """After one of its factors was written to, with all operands in use before."""
    blocks, fresh = ([b for b in mixed(operands) if packed_products.covers(b)] for _ in range(2))
    for b in [*blocks, *fresh]:
        b.momentum.copy_(randn(*b.shape, seed=8))
    for low_rank in (True, False):
        us = directions(blocks, 33, seed=1, low_rank=low_rank)
        vs = cpu.qv(blocks, us)
        if low_rank:
            met = [packed_gradients.LowRankTerms(u, v, u) for u, v in zip(us, vs, strict=True)]
            packed_gradients.packed_gradients(blocks, met, [low_ranks.residual(0.1, 1.0) for low_ranks in met])
        else:
            packed_gradients.packed_gradients(
                blocks, us, [lambda_update.residual(u, v, u, 0.1, None) for u, v in zip(us, vs, strict=True)]
            )
    kept = [(p, set(p._versions)) for p in map(packed_operator, blocks)]
    least = 7 if operands == torch.bfloat16 else 5  # R, L, transposes; P and S. float32 takes both sides from one
    assert all(len(names) >= least and not p.stale for p, names in kept)
    for b in [*blocks, *fresh]:
        b.structure.fishleg_aux[name].mul_(1.1)
    assert all(map(torch.equal, run(blocks, what), run(fresh, what)))


@EACH
@pytest.mark.parametrize("what", OPS)
def test_threads_do_not_matter(operands: torch.dtype, what: str) -> None:
    """Bit for bit, but for small products that torch makes, with blocks large enough to be shared out."""
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            blocks = [b for b in mixed(operands) if packed_products.covers(b)]
            found.append(run(blocks, what) + run(blocks, what))
    finally:
        torch.set_num_threads(before)
    assert sum(b.momentum.numel() for b in blocks) > 32768
    if operands == torch.float32 and what == "lambda low-rank" and torch_sums_otherwise():
        assert all(relative(x, y) <= 1e-4 for x, y in zip(*found, strict=True))
    else:
        assert all(map(torch.equal, *found))


@needs("amx")
def test_precision_may_change_between_steps() -> None:
    """... and λ with it; what was packed before is not taken for today's."""
    blocks = mixed(torch.bfloat16, weight_decay=0.1)
    exact, start = Exact(blocks), [theta(b).double() for b in blocks]
    ours = [k for k, b in enumerate(blocks) if packed_products.covers(b)]
    for step, operands in enumerate([torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16, None]):
        for k in ours:
            blocks[k].structure.operand_dtype = operands
            if step in (1, 3):
                blocks[k].structure.fishleg_aux["L"].mul_(1.2)
        assert all(
            packed_products.covers(blocks[k]) == (packed_matrix.ENGINES.get(operands) in packed_matrix.engines())
            for k in ours
        )
        gs = directions(blocks, 5, seed=100 * step, low_rank=step != 3)
        vs = cpu.qv(blocks, gs)
        errors = [relative(whole(vs[k]), exact_q(blocks[k], whole(gs[k]))) for k in ours]
        assert max(errors) <= 2 * ERRORS[operands or torch.float32].product
        assert cpu.theta_step(blocks, placed(blocks, gs), ThetaOptions(nesterov=True))[1]
        exact.step([*map(whole, gs)], "before", True, "rms")
    for b, t, s in zip(blocks, exact.thetas, start, strict=True):
        assert relative(theta(b).double() - s, t - s) <= 1e-2


@EACH
@pytest.mark.parametrize("at", [5, 8])
@torch.enable_grad()
def test_resuming_is_bit_for_bit(operands: torch.dtype, at: int) -> None:
    """In the midst of λ's cycle, or where it starts."""
    options = {
        "dtype": torch.float32,
        "precision": PRECISION[operands],
        "backend": "cpp",
        "update_aux_every": 4,
        "anchor_every": 8,
    }
    net, optimizer = make(**options)
    train(net, optimizer, range(at))
    assert all(map(packed_products.covers, optimizer.blocks))
    torch.save((net.state_dict(), optimizer.state_dict()), buffer := io.BytesIO())
    was = train(net, optimizer, range(at, at + 6), sizes=(6, 50))
    assert set(was) == {True, False}  # low-rank gradients and dense ones
    again, resumed = make(**options)
    train(again, resumed, range(2))  # a state to be overwritten
    buffer.seek(0)
    weights, kept = torch.load(buffer, weights_only=True)
    again.load_state_dict(weights)
    resumed.load_state_dict(kept)
    train(again, resumed, range(at, at + 6), sizes=(6, 50))
    assert torch.equal(state(resumed), state(optimizer))
