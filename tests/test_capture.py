"""Captured steps: which are replayed, that λ goes on being learned, and what a capture refuses.

Without a GPU graphs are stand-ins: a capture runs the step and takes back what it did to tensors, a replay runs it and
takes back what it did on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fishleg_fast import FishLeg, GaussianLikelihood
from fishleg_fast.capture import CapturedStep, CudaGraphs

LIKELIHOOD = GaussianLikelihood()


class Example:
    """A training loop on the same tensors."""

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float64, **given: Any) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).to(
            device, dtype
        )
        settings = {"lr": 0.02, "update_aux_every": 4, "anchor_every": 6, "capturable": True, **given}
        self.optimizer = FishLeg(self.net, likelihood=LIKELIHOOD, **settings)
        self.x, self.y = (torch.zeros(8, k, device=device, dtype=dtype) for k in (4, 3))
        self.batches = torch.Generator().manual_seed(1)
        self.scaler: Any = None

    def load(self) -> None:
        for t in (self.x, self.y):
            t.copy_(torch.randn(t.shape, generator=self.batches, dtype=torch.float64))

    def step(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = LIKELIHOOD.nll(self.y, self.net(self.x))
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return loss.detach()

    def tensors(self) -> list[Tensor]:
        own = [t for b in self.optimizer.blocks for t in (b.momentum, b.step, *b.structure.fishleg_aux.values())]
        counters = [t for t in self.optimizer._diagnostics._counts.values() if isinstance(t, Tensor)]
        return [*(p.detach() for p in self.net.parameters()), *own, *counters]

    def captured(self, **given: Any) -> CapturedStep:
        return CapturedStep(self.optimizer._training, self.step, StandIn(self), **given)


class StandIn:
    """Graphs for a CPU, and what was asked of them, a letter each: capture, replay, step as it is."""

    def __init__(self, example: Example) -> None:
        self.example, self.asked = example, ""

    def capture(self, step: Callable[[], Any]) -> tuple[StandIn, Any]:
        self.asked += "c"
        before = [(t, t.clone()) for t in self.example.tensors()]
        self.output = step()
        for t, was in before:
            t.copy_(was)
        self._step = step
        return self, self.output

    def replay(self) -> None:
        self.asked += "r"
        diagnostics = self.example.optimizer._diagnostics
        steps, figures = diagnostics.steps, diagnostics.figures()
        grads = [p.grad for p in self.example.net.parameters()]
        diagnostics.forget_steps(steps - 1)  # the host has counted this one
        self.output.copy_(self._step())
        assert diagnostics.steps == steps
        for name, figure in diagnostics.figures().items():  # in the memory of the graph
            if isinstance(figure, Tensor):
                figures[name].copy_(figure)
            else:
                figures[name][1].copy_(figure[1])
        diagnostics._last.update(figures)
        for p, grad in zip(self.example.net.parameters(), grads, strict=True):
            if p.grad is not None and grad is not None:
                grad.copy_(p.grad)
            p.grad = grad

    def run(self, step: Callable[[], Any]) -> Any:
        self.asked += "s"
        return step()


def train(example: Example, step: Callable[[], Any], steps: int, change: Callable[[int], None] | None = None) -> list:
    losses = []
    for k in range(steps):
        if change is not None:
            change(k)
        example.load()
        losses.append(step().clone())
    return losses


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_captured_step_trains_as_the_step_does(backend: str) -> None:
    plain, example = Example(backend=backend), Example(backend=backend)
    step = example.captured()
    assert train(plain, plain.step, 20) == train(example, step, 20)
    for a, b in zip(plain.tensors(), example.tensors(), strict=True):
        assert torch.equal(a, b)
    told = [x.optimizer.diagnostics() for x in (plain, example)]
    assert told[0] == told[1] and told[1]["aux_steps"] == 5 and told[1]["anchors"] == 4
    assert step._graphs.asked == "ssscrsrsrsrrrsrrrsrsr"  # λ learned before 4, 8, ..., anchored before 6, 12, ...
    assert step.captures == 1 and step.replays == 11


def test_gradients_and_figures_are_those_of_the_latest_step() -> None:
    plain, example = Example(), Example()
    step = example.captured()
    for _ in range(12):
        train(plain, plain.step, 1)
        train(example, step, 1)
        for p, q in zip(plain.net.parameters(), example.net.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
        assert plain.optimizer.diagnostics() == example.optimizer.diagnostics()


def test_a_rate_on_the_device_may_change_and_schedulers_write_to_it() -> None:
    examples = [Example(lr=torch.tensor(0.02, dtype=torch.float64)) for _ in range(2)]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(e.optimizer, 20) for e in examples]
    step = examples[1].captured()
    for _ in range(14):
        train(examples[0], examples[0].step, 1)
        train(examples[1], step, 1)
        for schedule in schedules:
            schedule.step()
    assert step.captures == 1
    for a, b in zip(examples[0].tensors(), examples[1].tensors(), strict=True):
        assert torch.equal(a, b)


def change_lr(example: Example, k: int) -> None:
    example.optimizer.param_groups[0]["lr"] = 0.02 if k < 9 else 0.01


def change_mode(example: Example, k: int) -> None:
    example.net.train(k < 9)


def change_memory(example: Example, k: int) -> None:
    if k == 9:
        example.net[2].weight.data = example.net[2].weight.data.clone()


@pytest.mark.parametrize("change", [change_lr, change_mode, change_memory])
def test_what_a_graph_holds_is_captured_again_where_it_changed(change: Callable[[Example, int], None]) -> None:
    plain, example = Example(), Example()
    step = example.captured()
    assert train(plain, plain.step, 14, lambda k: change(plain, k)) == train(
        example, step, 14, lambda k: change(example, k)
    )
    assert step.captures == 2
    for a, b in zip(plain.tensors(), example.tensors(), strict=True):
        assert torch.equal(a, b)


def test_a_float_rate_that_changes_at_every_step_is_refused_by_name() -> None:
    example = Example()
    step = example.captured()

    def decay(k: int) -> None:
        example.optimizer.param_groups[0]["lr"] *= 0.9

    with pytest.raises(RuntimeError, match=r"changes at every step: lr\..*lr=torch.tensor"):
        train(example, step, 20, decay)


def test_a_loaded_checkpoint_goes_on(backend: str = "reference") -> None:
    plain, example = Example(backend=backend), Example(backend=backend)
    step = example.captured()
    train(plain, plain.step, 9)
    train(example, step, 9)
    saved = [(e.net.state_dict(), e.optimizer.state_dict()) for e in (plain, example)]
    saved = [torch.utils._pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, s) for s in saved]
    train(plain, plain.step, 5)
    train(example, step, 5)
    for e, (net, optimizer) in zip((plain, example), saved, strict=True):
        e.net.load_state_dict(net)
        e.optimizer.load_state_dict(optimizer)
        e.batches.manual_seed(2)
    train(plain, plain.step, 8)
    train(example, step, 8)
    for a, b in zip(plain.tensors(), example.tensors(), strict=True):
        assert torch.equal(a, b)


def test_skipped_steps_are_counted_and_lambda_is_kept() -> None:
    plain, example = Example(), Example()
    step = example.captured()

    def spoil(e: Example) -> Callable[[int], None]:
        def change(k: int) -> None:
            load = type(e).load
            e.load = lambda: (load(e), e.x.mul_(float("inf") if k in (5, 6, 8, 9) else 1.0))  # type: ignore[method-assign]

        return change

    train(plain, plain.step, 14, spoil(plain))
    train(example, step, 14, spoil(example))
    told = example.optimizer.diagnostics()
    assert told["skipped_steps"] == plain.optimizer.diagnostics()["skipped_steps"] == 4
    for a, b in zip(plain.tensors(), example.tensors(), strict=True):
        assert torch.isfinite(a).all() and torch.equal(a, b)


class Reads(StandIn):
    """A capture in which the step reads from the device, as torch tells of it."""

    def capture(self, step: Callable[[], Any]) -> tuple[StandIn, Any]:
        step()
        raise RuntimeError(
            "CUDA error: operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA"
        )


def test_a_capture_that_fails_says_why_and_counts_nothing() -> None:
    example = Example()
    step = CapturedStep(example.optimizer._training, example.step, Reads(example))
    train(example, step, 3)
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"could not be captured: CUDA error: operation not permitted.*item"
        ) as told:
            train(example, step, 1)
        assert "DSA" not in str(told.value) and example.optimizer.diagnostics()["steps"] == 3


@pytest.mark.parametrize("times", [0, 2])
def test_a_function_that_is_not_one_step_is_refused(times: int) -> None:
    example = Example(update_aux_every=0, anchor_every=0, init="sgd")
    step = CapturedStep(
        example.optimizer._training, lambda: [example.step() for _ in range(times)], StandIn(example), 0
    )
    with pytest.raises(RuntimeError, match=f"optimizer.step\\(\\) once, but did so {times} times"):
        train(example, step, 1)


def test_what_cannot_be_captured_at_all_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="capturable=True"):
        Example(capturable=False).optimizer.capture(lambda: None)
    with pytest.raises(ValueError, match="CUDA device, but it is on: cpu"):
        Example().optimizer.capture(lambda: None)


@pytest.mark.parametrize("capturable", [False, True])
def test_a_grad_scaler_with_an_overflow(capturable: bool) -> None:
    """The step at which a scale overflows is skipped, and training goes on as without the scaler."""
    examples = [Example(dtype=torch.float32, capturable=capturable, thin_gradients=False) for _ in range(2)]
    examples[1].scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for k in range(9):
        for example in examples:
            example.load()
        if k == 5:
            examples[1].scaler._scale.fill_(float("inf"))
            before = [p.detach().clone() for p in examples[1].net.parameters()]
            examples[1].step()
            assert all(torch.equal(p, q) for p, q in zip(before, examples[1].net.parameters(), strict=True))
            examples[1].scaler._scale.fill_(2.0**10)
            if capturable:  # the step was the optimizer's to skip
                assert examples[1].optimizer.diagnostics()["skipped_steps"] == 1
            break
        for example in examples:
            example.step()
        for p, q in zip(*(e.net.parameters() for e in examples), strict=True):
            assert torch.allclose(p, q, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_on_a_device(backend: str) -> None:
    given = {"device": "cuda", "dtype": torch.float32, "backend": backend, "precision": "highest"}
    plain, example = Example(**given), Example(**given)
    step = example.optimizer.capture(example.step)
    assert isinstance(step._graphs, CudaGraphs)
    want, found = train(plain, plain.step, 30), train(example, step, 30)
    assert step.replays > 10 and torch.allclose(torch.stack(want), torch.stack(found), rtol=1e-3)
    assert plain.optimizer.diagnostics()["aux_steps"] == example.optimizer.diagnostics()["aux_steps"]
