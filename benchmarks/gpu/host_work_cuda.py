"""The CUDA backend's host work, on CPU tensors: the extension compiled for the CPU, with launches that do nothing.

Tables of descriptors are kernel parameters by value, so that no step uploads anything.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from benchmarks.gpu.host_work import Row, timed
from fishleg_fast import Kron
from fishleg_fast.backends import cuda
from fishleg_fast.backends.cuda import runtime
from fishleg_fast.backends.protocol import LambdaOptions, ThetaOptions
from fishleg_fast.model.block import Block, Part
from fishleg_fast.model.gradients import GradientInPlace

SIDE = 16  # of a layer: sizes make no difference to the host
TESTS = Path(__file__).resolve().parents[2] / "tests"


def stubbed() -> ModuleType:
    """The extension whose launches are only counted. ImportError where it cannot be compiled."""
    sys.path.append(str(TESTS))
    from support import cuda_emulation

    if cuda_emulation.compiler() is None:
        raise ImportError("a C++ compiler, g++ or clang++, is needed")
    return cuda_emulation.stubbed()


@contextmanager
def in_place(extension: ModuleType) -> Iterator[None]:
    """The backend on CPU tensors, with that extension."""
    before = runtime._runtime
    runtime._runtime = runtime.Runtime(extension, "cpu", lambda device: 0)
    try:
        yield
    finally:
        runtime._runtime = before


def linear_blocks(count: int, bias: bool) -> list[Block]:
    """Of as many linear layers, in one parameter group."""
    group = {"lr": 0.01, "beta": 0.9, "weight_decay": 0.0, "maximize": False, "base_lr": 0.01}
    blocks = []
    for k in range(count):
        shapes = [(SIDE, SIDE), (SIDE,)] if bias else [(SIDE, SIDE)]
        parts = [Part(nn.Parameter(torch.randn(shape))) for shape in shapes]
        block = Block(f"{k}", parts, 1, Kron(SIDE, SIDE + bias))
        block.allocate(on_device=False)
        block.groups = [group for _ in parts]
        blocks.append(block)
    return blocks


class Case:
    """Ops on blocks whose gradients lie elsewhere at every step, as after ``zero_grad(set_to_none=True)``."""

    def __init__(self, extension: ModuleType, count: int, bias: bool) -> None:
        self.extension, self.blocks = extension, linear_blocks(count, bias)
        self.kind = "with bias" if bias else "no bias"
        self.us = [GradientInPlace(b) for b in self.blocks]
        norm = torch.ones(())
        self.scaled = [u.scaled(norm) for u in self.us]
        self.vs, self.fvs = ([torch.randn(b.shape) for b in self.blocks] for _ in range(2))

    def row(self, op: str, call: Callable[[], object], repeats: int, learned: bool = False) -> Row:
        """``learned``: λ has been written to before each call."""
        held = []

        def prepare() -> None:
            held.append([b.grads for b in self.blocks])  # so that no address comes again
            for block in self.blocks:
                block.grads = [torch.randn_like(p) for p in block.params]
            if learned:
                self.learn()
            if op != "refresh":
                cuda.refresh(self.blocks)

        for _ in range(3):
            prepare()
            call()
        prepare()
        before = self.extension.launches()
        call()
        launches = self.extension.launches() - before
        times = timed(call, self.extension.last_launch, repeats, prepare)
        return times.row("cuda", f"{op}, {self.kind}", len(self.blocks), launches, 0, 0)

    def theta(self, normalize: str) -> Callable[[], object]:
        """A θ step."""
        options = ThetaOptions(normalize=normalize)
        return lambda: cuda.theta_step(self.blocks, self.us, options)

    def learn(self) -> None:
        """A λ step."""
        cuda.lambda_step(self.blocks, self.scaled, self.vs, self.fvs, LambdaOptions(damping=0.1, lr=0.01))

    def rows(self, repeats: int) -> list[Row]:
        """Of every op."""
        return [
            self.row("θ, rms", self.theta("rms"), repeats),
            self.row("θ, spectral", self.theta("spectral"), repeats),
            self.row("θ, rms, λ has changed", self.theta("rms"), repeats, learned=True),
            self.row("λ", self.learn, repeats),
            self.row("Q u", lambda: cuda.qv(self.blocks, self.scaled), repeats),
            self.row("refresh", lambda: cuda.refresh(self.blocks), repeats, learned=True),
        ]


def measure(count: int, repeats: int) -> list[Row]:
    """Ops on linear layers, with biases and without."""
    extension = stubbed()
    with torch.no_grad(), in_place(extension):
        return [row for bias in (True, False) for row in Case(extension, count, bias).rows(repeats)]
