"""Captured steps, with graphs that do what a CUDA graph does: a replay repeats what was done on tensors, and nothing of
what the host did.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_capture import LIKELIHOOD, Example, train
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fishleg_fast.capture import CapturedStep


class Recording(TorchDispatchMode):
    """What is done on tensors, in order. RuntimeError where a value is read, as in a CUDA graph's capture."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, out))
        return out


class Recorded:
    """A graph: made by taking the step, its first replay is that step."""

    def __init__(self, done: list[tuple[Any, Any, Any, Any]]) -> None:
        self.done, self.taken = done, True

    @torch.no_grad()
    def replay(self) -> None:
        if self.taken:
            self.taken = False
            return
        for func, args, kwargs, out in self.done:
            given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() not in given:  # no view, not in place
                    old.detach().copy_(new)


class Recorder:
    """Graphs for a CPU."""

    def capture(self, step: Callable[[], Any]) -> tuple[Recorded, Any]:
        with Recording() as recording:
            output = step()
        return Recorded(recording.done), output

    def run(self, step: Callable[[], Any]) -> Any:
        return step()


def momentum(e: Example, k: int) -> None:  # as OneCycleLR and CyclicLR write it
    e.optimizer.param_groups[0]["momentum"] = 0.9 if k < 9 else 0.5


def freeze(e: Example, k: int) -> None:
    e.net[2].weight.requires_grad_(k < 9)


def base_lr(e: Example, k: int) -> None:
    e.optimizer.param_groups[0]["base_lr"] = 0.02 if k < 9 else 0.2


def take_from_group(e: Example, k: int) -> None:
    if k == 9:
        e.optimizer.param_groups[0]["params"].pop()


def start_anew(e: Example, k: int) -> None:
    if k == 9:
        e.optimizer.state.clear()


@torch.no_grad()
def write_lambda(e: Example, k: int) -> None:
    if k == 9:
        for block in e.optimizer.blocks:
            for t in block.structure.fishleg_aux.values():
                t.add_(t.flip(0), alpha=0.3)


SAVED: dict[int, Any] = {}


def resume(e: Example, k: int) -> None:
    if k == 3:
        SAVED[id(e)] = copy.deepcopy(e.optimizer.state_dict())
    if k == 11:
        e.optimizer.load_state_dict(SAVED[id(e)])


CASES: dict[str, tuple[Callable[[Example, int], None], dict[str, Any]]] = {
    "nothing changes": (lambda e, k: None, {}),
    "a scheduler cycles momentum": (momentum, {}),
    "a layer is frozen": (freeze, {}),
    "base_lr, of the trust region": (base_lr, {"normalize": "trust", "damping_scale": "absolute"}),
    "anchored from training": (lambda e, k: None, {"anchor_from": "training"}),
    "a parameter leaves its group": (take_from_group, {}),
    "state is let go of": (start_anew, {}),
    "λ is written to": (write_lambda, {}),
    "a checkpoint between replays": (resume, {"update_aux_every": 6, "anchor_every": 0}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_replay_is_the_step_that_would_have_been_taken(name: str) -> None:
    change, given = CASES[name]
    plain, example = Example(backend="reference", **given), Example(backend="reference", **given)
    step = CapturedStep(example.optimizer._training, example.step, Recorder())
    want = train(plain, plain.step, 17, lambda k: change(plain, k))
    assert train(example, step, 17, lambda k: change(example, k)) == want
    assert step.replays > 4
    for a, b in zip(plain.tensors(), example.tensors(), strict=True):
        assert torch.equal(a, b)


def test_a_function_of_two_steps_is_refused_each_time_it_is_tried() -> None:
    example = Example(update_aux_every=0, anchor_every=0, init="sgd", backend="reference")
    step = CapturedStep(example.optimizer._training, lambda: [example.step() for _ in range(2)], Recorder(), 0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="did so 2 times"):
            step()


def test_a_step_that_is_refused_leaves_gradients_scaled() -> None:
    """GradScaler unscales them again when the step is tried again."""
    example = Example(dtype=torch.float32)
    example.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    example.load()
    example.step()
    group = example.optimizer.param_groups[0]["params"]
    group.append(torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(ValueError, match="parameter of the model"):
        example.step()
    group.pop()
    before = [p.grad.clone() for p in example.net.parameters() if p.grad is not None]
    loss = LIKELIHOOD.nll(example.y, example.net(example.x))
    plain = torch.autograd.grad(loss, list(example.net.parameters()))
    for was, g in zip(before, plain, strict=True):
        assert torch.allclose(was, 1024 * g, rtol=1e-4)
