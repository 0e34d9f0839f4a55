"""Packed blocks after what is rare: ops that are broken off, copies, passes under autocast, steps in inference mode."""

from __future__ import annotations

import copy
import gc
import itertools

import pytest
import torch
from torch import Tensor

from fishleg_fast import native
from fishleg_fast.algebra.structures.kron import Kron
from fishleg_fast.backends import cpu
from fishleg_fast.backends.cpu import packed_matrix, packed_products
from fishleg_fast.backends.cpu.state import packed_operator
from fishleg_fast.backends.protocol import LambdaOptions, ThetaOptions
from fishleg_fast.model.block import Block
from support.dense import randn, relative
from support.packed_blocks import EACH, ERRORS, block_of, curved, directions, exact_q, mixed, placed, whole
from support.training import make, state, train

PRECISION = {torch.bfloat16: "medium", torch.float32: "highest"}
KINDS = ["low-rank F v", "dense F v", "dense u"]
poisoned = pytest.mark.usefixtures("poisoned")


def ours(operands: torch.dtype) -> list[Block]:
    """Some packed blocks, none of them large."""
    return [b for b in mixed(operands) if packed_products.covers(b)][1:4]


def images(blocks: list[Block], low_rank: bool) -> list[Tensor]:
    """Q u by the cpp backend."""
    return [*map(whole, cpu.qv(blocks, directions(blocks, 33, seed=3, low_rank=low_rank)))]


def scale(blocks: list[Block], factor: float) -> None:
    for b in blocks:
        for t in b.structure.fishleg_aux.values():
            t.mul_(factor)


def step(blocks: list[Block], kind: str, rank: int = 33) -> None:
    """A λ step, or a θ step."""
    us = directions(blocks, rank, seed=4, low_rank="dense u" not in kind)
    if "theta" in kind:
        assert cpu.theta_step(blocks, placed(blocks, us), ThetaOptions())[1]
    else:
        assert cpu.lambda_step(
            blocks, us, cpu.qv(blocks, us), curved(blocks, kind), LambdaOptions(damping=0.1, lr=0.01)
        )[1]


class Interrupted:
    """Batches whose run is broken off, once: that of the given number, before its packings or after them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, packs: bool) -> None:
        self.left, run, extension = number, packed_matrix.ProductBatch.run, native.extension()

        def broken(batch: packed_matrix.ProductBatch) -> None:
            self.left -= 1
            if self.left == -1 and packs and batch._packs:
                extension.pack(batch.engine, batch._packs, 1)
            if self.left == -1:
                raise KeyboardInterrupt
            run(batch)

        monkeypatch.setattr(packed_matrix.ProductBatch, "run", broken)


@EACH
@poisoned
@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "theta", "theta dense u"])
def test_an_interrupted_op_leaves_no_stale_operand(
    operands: torch.dtype, kind: str, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its batches is broken off once, after λ was written to. What it did not make is made by the next op."""
    for number in itertools.count():
        blocks, fresh = ours(operands), ours(operands)
        for those in (blocks, fresh):
            step(those, "dense u")  # all operands are in use
            scale(those, 1.1)
        with monkeypatch.context() as patch:
            interrupted = Interrupted(patch, number, packs)
            try:
                step(blocks, kind)
            except KeyboardInterrupt:
                pass
        if interrupted.left >= 0:  # it has no more of them
            break
        for low_rank in (True, False):
            assert all(map(torch.equal, images(blocks, low_rank), images(fresh, low_rank))), (number, low_rank)
        step(blocks, "dense u")
        step(fresh, "dense u")
        lambdas = [[t for b in those for t in b.structure.fishleg_aux.values()] for those in (blocks, fresh)]
        assert all(map(torch.equal, *lambdas)), number
    assert number >= 1


@poisoned
@pytest.mark.parametrize(("one", "other"), [*itertools.permutations(["amx", "amx split", "avx512"], 2)])
def test_a_batch_refuses_operands_of_another_engine(one: str, other: str) -> None:
    """Their layouts differ: to write or read one as the other would leave its memory."""
    if not {one, other} <= set(packed_matrix.engines()):
        pytest.skip(f"this processor, or this build, has not both {one} and {other}")
    batch, x, out = packed_matrix.ProductBatch(one), torch.ones(5, 5), torch.empty(5, 5)
    mine, theirs = ([packed_matrix.PackedMatrix(engine, side, 5, 5) for side in (0, 1)] for engine in (one, other))
    with pytest.raises(AssertionError):
        batch.pack(x, theirs[0])
    for left, right, to in [
        (theirs[0], mine[1], out),
        (mine[0], theirs[1], out),
        (*theirs, out),
        (*mine, theirs[0]),
        (*mine, theirs[1]),
    ]:
        with pytest.raises(AssertionError):
            batch.multiply(left, right, to)
    batch.pack(x, mine[0])
    batch.pack(x, mine[1])
    batch.multiply(*mine, out)
    batch.run()
    assert torch.equal(out, torch.full((5, 5), 5.0))


@EACH
@poisoned
@pytest.mark.parametrize("first", ["original", "copy"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_has_operands_of_its_own(operands: torch.dtype, kind: str, first: str) -> None:
    """Neither one's products are those of the other's λ, whichever is used first after one was written to."""
    blocks = ours(operands)
    step(blocks, kind)
    copies = copy.deepcopy(blocks)
    pairs = [(blocks, copies), (copies, blocks)]
    for which, (used, resting) in enumerate(pairs if first == "original" else pairs[::-1]):
        before = [images(resting, low_rank) for low_rank in (True, False)]
        scale(used, 1.5 + which)
        step(used, kind)
        for low_rank, want in zip((True, False), before, strict=True):
            images(used, low_rank)
            assert all(map(torch.equal, images(resting, low_rank), want))
            for those in (used, resting):
                us = [whole(u) for u in directions(those, 33, seed=3, low_rank=low_rank)]
                errors = [
                    relative(v, exact_q(b, u)) for b, u, v in zip(those, us, images(those, low_rank), strict=True)
                ]
                assert max(errors) <= 3 * ERRORS[operands].product
    held = [
        {p.memory.data_ptr() for b in those for p in packed_operator(b)._scratch.values()} for those in (blocks, copies)
    ]
    assert not held[0] & held[1]


def held() -> list[packed_matrix.PackedMatrix]:
    """All packed matrices that anything holds."""
    gc.collect()
    return [x for x in gc.get_objects() if type(x) is packed_matrix.PackedMatrix]


@EACH
@poisoned
@pytest.mark.parametrize("kind", KINDS)
def test_memory_held_between_steps_is_bounded(operands: torch.dtype, kind: str) -> None:
    """By λ's own size: P, S and factors as operands, and a direction's. What only a λ step needs goes with it."""
    before = sum(p.memory.nbytes for p in held())
    blocks = [block_of(Kron, 256, 256, k, operands=operands) for k in range(3)]
    entries = sum(t.numel() for b in blocks for t in b.structure.fishleg_aux.values())
    for rank in (20, 32):
        step(blocks, "theta" + kind, rank=rank)
        step(blocks, kind, rank=rank)
    grown = sum(p.memory.nbytes for p in held()) - before
    assert grown <= {torch.bfloat16: 16, torch.float32: 24}[operands] * entries, grown / entries


BACKENDS = ["reference", pytest.param("cpp", marks=pytest.mark.skipif(not native.available()[0], reason="not built"))]


@pytest.mark.parametrize("low_rank", [True, False], ids=["low-rank", "dense"])
@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forward_pass_under_autocast_before_a_step(backend: str, precision: str, low_rank: bool) -> None:
    """F v is then bfloat16, of gradients that are float32. λ follows as without, but for rounding."""
    states = []
    for autocast in (False, True):
        net, optimizer = make(low_rank, dtype=torch.float32, backend=backend, precision=precision, update_aux_every=1)
        train(net, optimizer, range(2))
        start = state(optimizer)
        for k in range(4):
            x = randn(6, 40, seed=10 + k).sigmoid().float()
            optimizer.zero_grad()
            optimizer.likelihood.nll(x, net(x)).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                net(x)
            optimizer.step()
        found = optimizer.diagnostics()
        assert found["steps"] == 6 and found["skipped_aux_steps"] == 0
        states.append(state(optimizer) - start)
    assert 0 < relative(*states) <= 0.1


@pytest.mark.parametrize("low_rank", [True, False], ids=["low-rank", "dense"])
@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_step_in_inference_mode(at: int, backend: str, precision: str, low_rank: bool) -> None:
    """... of another batch size, in λ's cycle of three: to the bit as without, and what it kept can be written to."""
    for size in (2, 50):
        ends = []
        for mode in (False, True):
            net, optimizer = make(low_rank, dtype=torch.float32, backend=backend, precision=precision)
            train(net, optimizer, range(at))
            x = randn(size, 40, seed=99).sigmoid().float()
            optimizer.zero_grad()
            optimizer.likelihood.nll(x, net(x)).backward()
            with torch.inference_mode(mode):
                optimizer.step()
            train(net, optimizer, range(at + 1, at + 5), sizes=(6, 2, 50))
            ends.append(state(optimizer))
        assert torch.equal(*ends)
