"""Training steps as a CUDA graph: ordinary steps are replayed, those that learn or anchor λ are taken as they are.

Those draw labels, look at what they find, and repeat the model's passes apart from the user's: nothing that a graph can
hold. With one such step in ten the host's work of the other nine is gone, and λ goes on being learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .diagnostics import Diagnostics
from .model.block import Block

WARMUP = 3  # steps before the first capture: libraries and allocators set themselves up in them
WARMUP_OF_SEVERAL = 11  # with DistributedDataParallel, by torch's notes on CUDA graphs


class Graph(Protocol):
    """What was captured."""

    def replay(self) -> None:
        """Do on the device what the captured step did there."""


class Graphs(Protocol):
    """How steps are captured on a device."""

    def capture(self, step: Callable[[], Any]) -> tuple[Graph, Any]:
        """Run ``step`` without its doing anything on the device; what it returned."""

    def run(self, step: Callable[[], Any]) -> Any:
        """Run ``step`` where a capture may follow."""


class CudaGraphs:
    """By torch.cuda, on a stream of its own, in one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, step: Callable[[], Any]) -> tuple[Graph, Any]:
        """As the protocol has it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, self._pool, self._stream):
            output = step()
        return graph, output

    def run(self, step: Callable[[], Any]) -> Any:
        """As the protocol has it."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            output = step()
        current.wait_stream(self._stream)
        return output


@dataclass(frozen=True)
class Training:
    """What a captured step has to know of the optimizer."""

    optimizer: Optimizer
    diagnostics: Diagnostics
    ordinary: Callable[[], bool]  # whether the next step neither learns nor anchors λ, of parameters that are known
    facts: Callable[[], dict[str, Any]]  # what a graph holds as it was, by name
    before: Callable[[], None]  # what the host does before a replay: has P and S follow a λ that was written to
    after: Callable[[], None]  # and after one: sees what the next step needs of the user's passes

    @property
    def params(self) -> list[Tensor]:
        """Of all groups."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def all_facts(self) -> dict[str, Any]:
        """Those, and the groups'."""
        found = {**self.facts(), "a parameter's memory": tuple(p.data_ptr() for p in self.params)}
        found["requires_grad"] = tuple(p.requires_grad for p in self.params)
        for name in ("lr", "base_lr", "beta", "weight_decay", "maximize", "normalize"):
            values = [group.get(name) for group in self.optimizer.param_groups]
            found[name] = tuple(("at", v.data_ptr()) if isinstance(v, Tensor) else v for v in values)
        return found


class CapturedStep:
    """A training step, called as the function that it was made of, without arguments. See ``FishLeg.capture``.

    Attributes:
        captures: how many times a graph was captured.
        replays: how many steps were replayed.
    """

    def __init__(self, training: Training, step: Callable[[], Any], graphs: Graphs, warmup: int = WARMUP) -> None:
        self._training, self._step, self._graphs, self._warmup = training, step, graphs, warmup
        self._graph: Graph | None = None
        self._output: Any = None
        self._known: dict[str, Any] = {}
        self._grads: list[Tensor | None] = []  # of the graph
        self._figures: dict[str, Any] = {}
        self._in_vain = 0  # graphs in a row that were replayed no more than once
        self._replayed = 0  # how often the latest graph was
        self.captures = self.replays = 0

    def __call__(self) -> Any:
        """One step. Returns what the function does: of a replayed step in the memory that the next one writes to."""
        if self._warmup > 0 or not self._training.ordinary():
            self._warmup -= 1
            return self._graphs.run(self._step)
        now = self._training.all_facts()
        if self._graph is None or now != self._known:
            self._capture(now)
        else:  # the host's side of the step: gradients and figures are the graph's
            for p, grad in zip(self._training.params, self._grads, strict=True):
                p.grad = grad
            self._training.before()
            self._training.diagnostics.count_replay(self._figures)
        assert self._graph is not None
        self._graph.replay()
        self._training.after()
        self.replays += 1
        self._replayed += 1
        return self._output

    def _capture(self, now: dict[str, Any]) -> None:
        """A graph of the step, whose host's side is then that of the replay that follows."""
        changed = [name for name in now if self._graph is not None and self._known[name] != now[name]]
        self._in_vain = self._in_vain + 1 if changed and self._replayed <= 1 else 0
        if self._in_vain > 1:
            raise RuntimeError(
                f"a captured step should be replayed, but changes at every step: {', '.join(changed)}. A graph holds "
                "numbers as they were: give lr as a tensor on the device, lr=torch.tensor(0.01, device='cuda'), to "
                "which schedulers write, and leave parameters where they are"
            )
        diagnostics = self._training.diagnostics
        before = diagnostics.steps
        try:
            self._graph, self._output = self._graphs.capture(self._step)
        except Exception as error:
            self._graph = None
            diagnostics.forget_steps(before)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RuntimeError(
                f"the step could not be captured: {reason}. A step to be captured reads nothing from the device "
                "(.item(), float(), print), makes no tensors of Python's numbers, and finds its inputs in the same "
                "tensors each time"
            ) from error
        taken = diagnostics.steps - before
        if taken != 1:
            self._graph = None
            diagnostics.forget_steps(before)
            raise RuntimeError(f"a step to be captured should call optimizer.step() once, but did so {taken} times")
        self._known, self._replayed = now, 0
        self._grads, self._figures = [p.grad for p in self._training.params], diagnostics.figures()
        self.captures += 1


def memory_facts(model: nn.Module, blocks: Sequence[Block]) -> dict[str, Any]:
    """Where λ is, and the model's mode."""
    tensors = (t for b in blocks for t in (b.momentum, *b.structure.fishleg_aux.values()))
    return {
        "λ's memory": tuple(t.data_ptr() for t in tensors),
        "train() or eval()": tuple(module.training for module in model.modules()),
    }
