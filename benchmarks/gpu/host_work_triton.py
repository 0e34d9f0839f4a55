"""The Triton backend's host work, on CPU tensors: no kernel is launched."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.host_work import Row, timed
from fishleg_fast import Kron
from fishleg_fast.backends.protocol import LambdaOptions, ThetaOptions
from fishleg_fast.kernels import backend
from fishleg_fast.kernels.host import launch as launching
from fishleg_fast.kernels.host.tables import staging
from fishleg_fast.model.block import Block, Part
from fishleg_fast.model.gradients import GradientInPlace

SIDE = 16  # of a layer: sizes make no difference to the host
PACKAGE = launching.__name__.rpartition(".host.")[0]


class Launches:
    """Stands for ``launch``: counts, and notes when."""

    def __init__(self) -> None:
        self.count, self.latest = 0, 0.0

    def __call__(self, kernel: object, tiles: int, *args: object, **constants: object) -> None:
        if tiles:
            self.count += 1
            self.latest = time.perf_counter()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """In the place of every module's ``launch``."""
        real = launching.launch
        modules = [m for name, m in sys.modules.items() if name.startswith(PACKAGE) and vars(m).get("launch") is real]
        for module in modules:
            vars(module)["launch"] = self
        try:
            yield
        finally:
            for module in modules:
                vars(module)["launch"] = real


def linear_blocks(count: int, on_device: bool) -> list[Block]:
    """Of as many linear layers, half of them with a bias; ``on_device``: their steps are counted there."""
    group = {"lr": 0.01, "beta": 0.9, "weight_decay": 0.0, "maximize": False, "base_lr": 0.01}
    blocks = []
    for k in range(count):
        parts = [Part(nn.Parameter(torch.randn(SIDE, SIDE)))]
        if k % 2:
            parts.append(Part(nn.Parameter(torch.randn(SIDE))))
        block = Block(f"{k}", parts, 1, Kron(SIDE, SIDE + k % 2))
        block.allocate(on_device)
        block.groups = [group for _ in parts]
        blocks.append(block)
    return blocks


def fresh_gradients(blocks: list[Block], held: list[Any]) -> None:
    """As after ``zero_grad(set_to_none=True)``: where no gradient was before, for ``held`` keeps those."""
    for block in blocks:
        block.grads = [torch.randn_like(part.param) for part in block.parts]
        held.append(block.grads)


class Case:
    """Blocks, and what a step takes of them: ``prepare`` makes it, ``call`` is measured."""

    def __init__(self, blocks: list[Block], op: Callable[..., object], fresh: bool) -> None:
        self.blocks, self._op, self._fresh = blocks, op, fresh
        self._held: list[Any] = []
        fresh_gradients(blocks, self._held)

    def prepare(self) -> None:
        """The next step's gradients, at addresses that none had before if they are to be ``fresh``."""
        if self._fresh:
            fresh_gradients(self.blocks, self._held)

    def call(self) -> None:
        """The op."""
        self._op(self.blocks)

    def measured(self, name: str, repeats: int) -> Row:
        """A row of the table."""
        launches, sizes = Launches(), []
        with torch.no_grad(), launches.in_place():
            for _ in range(3):
                self.prepare()
                self.call()
            staging.observers.append(sizes.append)
            launches.count = 0
            times = timed(self.call, lambda: launches.latest, repeats, self.prepare)
            staging.observers.remove(sizes.append)
        counts = launches.count // repeats, -(-len(sizes) // repeats), sum(sizes) // repeats
        return times.row("triton", name, len(self.blocks), *counts)


def theta_case(count: int, options: ThetaOptions, fresh: bool) -> Case:
    """A θ step."""
    blocks = linear_blocks(count, options.capturable)
    gs = [GradientInPlace(b) for b in blocks]
    return Case(blocks, lambda blocks: backend.theta_step(blocks, gs, options), fresh)


def lambda_case(count: int, options: LambdaOptions, op: str = "lambda_step") -> Case:
    """A λ step, or the Q u before it, with gradients times a scalar."""
    blocks = linear_blocks(count, options.capturable)
    norm = torch.ones(())
    us = [GradientInPlace(b, norm) for b in blocks]
    vs, fvs = ([torch.randn(b.shape) for b in blocks] for _ in range(2))
    learn = lambda blocks: backend.lambda_step(blocks, us, vs, fvs, options)
    return Case(blocks, learn if op == "lambda_step" else lambda blocks: backend.qv(blocks, us), True)


def measure(count: int, repeats: int) -> list[Row]:
    """θ steps by rule, with gradients at new addresses and the old ones, counted on the host and not; λ steps."""
    found = []
    for on_device, counted in ((False, ""), (True, ", capturable")):
        for rule in ("rms", "spectral"):
            options = ThetaOptions(normalize=rule, capturable=on_device)
            for fresh, where in ((True, ""), (False, ", gradients stay")):
                found.append(theta_case(count, options, fresh).measured(f"θ, {rule}{counted}{where}", repeats))
        learning = LambdaOptions(damping=0.1, lr=0.01, capturable=on_device)
        found.append(lambda_case(count, learning).measured(f"λ{counted}", repeats))
    found.append(lambda_case(count, learning, "qv").measured("Q u", repeats))
    return found
