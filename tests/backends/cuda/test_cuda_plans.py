"""A plan that is found again follows whatever has changed in its blocks: each change against the reference."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cuda_cases_lambda import aux_inputs
from fishleg_fast.algebra.structures.kron import Kron
from fishleg_fast.backends import cuda, reference
from fishleg_fast.backends.cuda import plans, runtime, state
from fishleg_fast.backends.cuda.plans import Op
from fishleg_fast.backends.protocol import LambdaOptions, ThetaOptions
from fishleg_fast.model.block import Block, Part
from support.blocks import make_block
from support.cuda_blocks import assert_close, layer, set_gradients
from support.cuda_emulation import emulated, stubbed
from support.dense import randn, relative

pytestmark = pytest.mark.usefixtures("poisoned_workspaces")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_runtime", runtime.Runtime(emulated(), "cpu", lambda device: 0))


def pair() -> tuple[list[Block], list[Block]]:
    """The same blocks twice: layers, one with an outer diagonal, one that is rows of a parameter."""

    def blocks() -> list[Block]:
        made = [layer(CPU, 6, 6, weight_decay=0.1), layer(CPU, 4, 7, seed=1), layer(CPU, 2, 258, seed=2)]
        made.append(make_block(Kron(5, 5, scale=True, dtype=torch.float32), [randn(5, 5).float()], seed=3))
        rows = make_block(Kron(3, 4, dtype=torch.float32), [randn(9, 4, seed=5).float()], seed=4)
        rows.parts = [Part(rows.parts[0].param, slice(3, 6))]
        for name in ("shape", "_layout"):
            rows.__dict__.pop(name, None)
        rows.allocate(on_device=False)
        return [*made, rows]

    return blocks(), blocks()


def renew(block: Block, name: str) -> None:
    block.structure.fishleg_aux[name] = 0.8 * block.structure.fishleg_aux[name]


def set_data(block: Block, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for part in block.parts:
        part.param.data = change(part.param.data)


def regroup(blocks: list[Block], **changes: Any) -> None:
    for block in blocks:
        block.groups = [{**block.groups[0], **changes} for _ in block.groups]


# Each as it is done to both lists of blocks between two steps.
CHANGES: dict[str, Callable[[list[Block]], object]] = {
    "momentum is replaced": lambda bs: [setattr(b, "momentum", b.momentum + 1) for b in bs],
    "λ is replaced": lambda bs: renew(bs[0], "R"),
    "an outer diagonal is replaced": lambda bs: renew(bs[3], "A"),
    "λ is written to": lambda bs: bs[1].structure.fishleg_aux["L"].mul_(0.5),
    "products are made by another": lambda bs: (bs[0].structure.fishleg_aux["R"].mul_(2), bs[0].structure.cache),
    "parameters move": lambda bs: [set_data(b, lambda t: t.clone()) for b in bs],
    "a parameter is transposed in place": lambda bs: set_data(bs[3], lambda t: t.T),
    "a parameter gets other strides": lambda bs: set_data(bs[3], lambda t: t.T.contiguous().T),
    "a parameter becomes bfloat16": lambda bs: set_data(bs[1], lambda t: t.bfloat16()),
    "counters are replaced": lambda bs: [setattr(b, "step", torch.tensor(7.0)) for b in bs],
    "a counter is written to": lambda bs: bs[2].step.fill_(3),
    "rates change": lambda bs: [b.groups[0].update(lr=0.3, weight_decay=0.2, beta=0.5) for b in bs],
    "groups are replaced": lambda bs: regroup(bs, lr=0.01, beta=0.2),
    "a rate becomes a tensor": lambda bs: regroup(bs, lr=torch.tensor(0.3)),
    "a block goes": lambda bs: bs.pop(1),
    "blocks are in another order": lambda bs: bs.reverse(),
    "a block is no polar factor's any more": lambda bs: setattr(bs[0], "spectral", False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_theta_step_follows_a_change(change: str) -> None:
    spectral = "polar" in change
    ours, theirs = ([b for b in blocks if not spectral or b.shape[1] < 100] for blocks in pair())
    options = ThetaOptions(normalize="spectral" if spectral else "rms")
    for step in (1, 2, 3):
        if step == 2:
            assert Op.THETA in ours[0].kept(state.CudaState).recent  # where it will be found again
            for blocks in (ours, theirs):
                CHANGES[change](blocks)
        assert cuda.theta_step(ours, set_gradients(ours, step), options)[1]
        assert reference.theta_step(theirs, set_gradients(theirs, step), options)[1]
    assert_close(ours, theirs, 5e-3 if spectral else 1e-5)


LAMBDA_CHANGES: dict[str, Callable[[list[Block]], object]] = {
    **{name: CHANGES[name] for name in ("λ is replaced", "λ is written to", "parameters move", "a block goes")},
    "λ's memory is replaced": lambda bs: setattr(bs[0].structure.fishleg_aux["R"], "data", torch.eye(6)),
    "a moment is replaced": lambda bs: bs[0].exp_avg.update(R=bs[0].exp_avg["R"] + 1),
    "moments are in another order": lambda bs: setattr(bs[0], "exp_avg", dict(reversed(bs[0].exp_avg.items()))),
    "aux counters are replaced": lambda bs: [setattr(b, "aux_step", torch.tensor(9.0)) for b in bs],
}


@pytest.mark.parametrize("change", LAMBDA_CHANGES)
def test_a_lambda_step_follows_a_change(change: str) -> None:
    ours, theirs = pair()
    for step in (1, 2, 3):
        if step == 3:
            for blocks in (ours, theirs):
                LAMBDA_CHANGES[change](blocks)
        options = LambdaOptions(damping=0.1, lr=1e-2 * step, eps=1e-2)
        us, vs, fvs = aux_inputs(ours, reference, step)
        assert cuda.lambda_step(ours, us, vs, fvs, options)[1]
        assert reference.lambda_step(theirs, *aux_inputs(theirs, reference, step), options)[1]
    assert_close(ours, theirs, 1e-4)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.aux_step == other.aux_step


def test_precision_is_followed() -> None:
    blocks = [layer(CPU, 40, 50)]
    u = randn(40, 50).float()
    exact = reference.qv(blocks, [u])[0]
    errors = []
    for precision in ("ieee", "bf16", "ieee"):
        blocks[0].structure.precision = precision
        us = set_gradients(blocks, 1)
        errors.append(relative(cuda.qv(blocks, us)[0], reference.qv(blocks, us)[0]))
        assert relative(cuda.qv(blocks, [u])[0], exact) <= 2e-2
    assert errors[1] > 1e-4 and max(errors[0], errors[2]) < 1e-5


def test_gradients_that_come_and_go_need_no_new_plan() -> None:
    ours, theirs = pair()
    kept = None
    for step in range(1, 6):
        for blocks, op in ((ours, cuda), (theirs, reference)):
            gs = set_gradients(blocks, step)
            for k in (0, 2):
                if step % 2:
                    blocks[k].grads[step % 3 != 0] = None
            op.theta_step(blocks, gs, ThetaOptions())
        recent = ours[0].kept(state.CudaState).recent[Op.THETA]
        kept = kept or recent
        assert recent is kept
    assert_close(ours, theirs, 1e-5)


def test_a_sparse_gradient_and_one_of_another_type_are_followed() -> None:
    ours, theirs = pair()
    for step, change in ((1, torch.clone), (2, torch.Tensor.to_sparse), (3, torch.clone), (4, torch.Tensor.half)):
        for blocks, op in ((ours, cuda), (theirs, reference)):
            gs = set_gradients(blocks, step)
            blocks[3].grads[0] = change(blocks[3].grads[0])
            op.theta_step(blocks, gs, ThetaOptions())
    assert_close(ours, theirs, 1e-5)


def test_optimizers_in_threads_keep_apart() -> None:
    """Each of its own blocks, one after the other in turn."""
    pairs = [pair() for _ in range(2)]
    turn = threading.Barrier(2)

    def train(ours: list[Block]) -> None:
        with torch.no_grad():
            for step in (1, 2, 3):
                turn.wait()
                gs = set_gradients(ours, step)
                with lock:
                    cuda.theta_step(ours, gs, ThetaOptions())

    lock = threading.Lock()  # the emulation runs one kernel at a time
    threads = [threading.Thread(target=train, args=(ours,)) for ours, _ in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in pairs:
        for step in (1, 2, 3):
            reference.theta_step(theirs, set_gradients(theirs, step), ThetaOptions())
        assert_close(ours, theirs, 1e-5)


def test_a_plan_keeps_no_block_alive() -> None:
    ours, _ = pair()
    cuda.theta_step(ours, set_gradients(ours, 1), ThetaOptions())
    gone = weakref.ref(ours[1])
    held = weakref.ref(ours[1].momentum)
    del ours[1]
    cuda.theta_step(ours, set_gradients(ours, 1), ThetaOptions())
    gc.collect()
    assert gone() is None
    del ours
    gc.collect()
    assert held() is None


# What the host does


def test_ten_thousand_steps_with_other_addresses_grow_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches stubbed. Gradients are new tensors at every step; a plan is made once, and nothing is uploaded."""
    monkeypatch.setattr(runtime, "_runtime", runtime.Runtime(stubbed(), "cpu", lambda device: 0))
    made = []
    init = plans.Plan.__init__
    monkeypatch.setattr(plans.Plan, "__init__", lambda self, *a: (made.append(1), init(self, *a))[1])
    blocks = [layer(CPU, 3, 4, seed=k) for k in range(3)]
    spares = [[[torch.empty_like(g) for g in b.grads] for b in blocks] for _ in range(5)]
    gs = set_gradients(blocks, 1)

    def steps(count: int) -> set[int]:
        addresses = set()
        for k in range(count):
            for block, grads in zip(blocks, spares[k % 5], strict=True):
                block.grads = [t.detach() for t in grads]
            addresses.add(blocks[0].grads[0].data_ptr())
            cuda.theta_step(blocks, gs, ThetaOptions())
        return addresses

    steps(2000)
    plans_before, blocks_before = len(made), sys.getallocatedblocks()
    assert len(steps(10_000)) == 5
    assert len(made) == plans_before and sys.getallocatedblocks() - blocks_before < 500


def test_hundred_layers_take_one_launch_for_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_runtime", runtime.Runtime(stubbed(), "cpu", lambda device: 0))
    blocks = [layer(CPU, 3, 4, seed=k) for k in range(100)]
    cuda.refresh(blocks)
    gs = set_gradients(blocks, 1)
    for expected, op in (
        (4, lambda: cuda.theta_step(blocks, gs, ThetaOptions())),
        (24, lambda: cuda.theta_step(blocks, gs, ThetaOptions(normalize="spectral"))),
        (8, lambda: cuda.lambda_step(blocks, gs, [b.momentum for b in blocks], [b.momentum for b in blocks],
                                     LambdaOptions(damping=0.1, lr=1e-3))),
    ):  # fmt: skip
        before = stubbed().launches()
        op()
        assert stubbed().launches() - before == expected
