"""Copies to the device: pinned memory used again when a copy is over, one upload a step, and nothing that grows."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from fishleg_fast import Kron
from fishleg_fast.backends.protocol import LambdaOptions, ThetaOptions
from fishleg_fast.kernels import backend
from fishleg_fast.kernels.host.state import TritonState
from fishleg_fast.kernels.host.tables import staging, streams, uploads
from fishleg_fast.model.block import Block
from fishleg_fast.model.gradients import GradientInPlace
from support.blocks import make_block
from support.dense import randn
from support.triton_rows import recorded


class Device:
    """A made-up one, whose copies are over some while after they were queued."""

    def __init__(self) -> None:
        self.behind = 0  # copies that are not over
        self.copies = 0
        self.waits = 0
        self.pinned: list[Tensor] = []
        self.stream = 1
        device = self

        class Event:
            def record(self) -> None:
                device.copies += 1
                self.copy = device.copies

            def query(self) -> bool:
                return self.copy <= device.copies - device.behind

            def synchronize(self) -> None:
                device.waits += 1
                device.behind = device.copies - self.copy

        self.Event = Event

    def pin(self, size: int) -> Tensor:
        self.pinned.append(torch.empty(size, dtype=torch.uint8))
        return self.pinned[-1]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    made = Device()
    monkeypatch.setattr(staging, "asynchronous", lambda device: True)
    monkeypatch.setattr(staging, "pinned", made.pin)
    monkeypatch.setattr(staging, "_rings", {})
    monkeypatch.setattr(streams, "stream_of", lambda device: made.stream)
    monkeypatch.setattr(torch.cuda, "Event", made.Event)
    with torch.no_grad():
        yield made


def test_pinned_memory_is_used_again(device: Device) -> None:
    for k in range(100):
        target = torch.zeros(3, dtype=torch.int64)
        staging.send(torch.tensor([k, k + 1, k + 2]), target)
        assert target.tolist() == [k, k + 1, k + 2]
    assert len(device.pinned) == staging.RING and device.waits == 0
    device.stream = 2
    staging.send(b"abc", torch.zeros(3, dtype=torch.uint8))
    assert len(device.pinned) == staging.RING + 1


def test_what_is_under_way_is_not_written_to(device: Device) -> None:
    device.behind = 5
    for k in range(40):
        staging.send(bytes([k]), torch.zeros(1, dtype=torch.uint8))
    assert device.waits == 0  # never more than the ring behind
    device.behind = 30
    staging.send(b"x", torch.zeros(1, dtype=torch.uint8))
    assert device.waits == 1 and len(device.pinned) == staging.RING


def test_larger_copies(device: Device) -> None:
    for size in (10, 5000, 20_000, 3 << 20):
        for _ in range(2 * staging.RING):
            source = torch.randint(0, 255, (size,), dtype=torch.uint8)
            target = torch.zeros_like(source)
            staging.send(source, target)
            assert torch.equal(source, target)
    kept = [piece.numel() for ring in staging._rings.values() for piece, _ in ring._pieces]
    assert len(kept) == staging.RING and max(kept) <= staging.LARGEST


def test_a_captured_copy_keeps_its_source(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the graph reads again at every replay: it is not of the ring."""
    monkeypatch.setattr(streams, "capturing", lambda: True)
    monkeypatch.setattr(streams, "_captured", {})
    staging.send(b"12345678", torch.zeros(8, dtype=torch.uint8))
    ((piece,),) = streams._captured.values()
    assert piece is device.pinned[0] and bytes(piece.tolist()) == b"12345678" and staging._rings == {}


def linear_blocks() -> list[Block]:
    sizes = [(3, 5), (4, 4), (2, 7)]
    return [make_block(Kron(m, n + 1, dtype=torch.float32), [randn(m, n).float(), randn(m).float()]) for m, n in sizes]


class Arena:
    """Gradients at addresses that none had before."""

    def __init__(self, blocks: list[Block], steps: int) -> None:
        self._blocks, self._at = blocks, 0
        sizes = [part.param.numel() for b in blocks for part in b.parts]
        self._memory = torch.zeros(steps * sum(-(-k // 16) * 16 for k in sizes))

    def next(self) -> None:
        for b in self._blocks:
            b.grads = [self._view(part.param) for part in b.parts]

    def _view(self, p: Tensor) -> Tensor:
        at, self._at = self._at, self._at + -(-p.numel() // 16) * 16
        return self._memory[at : at + p.numel()].view(p.shape)


def tensors() -> int:
    gc.collect()
    return sum(type(x) is Tensor for x in gc.get_objects())


def test_ten_thousand_steps(device: Device) -> None:
    """θ steps with gradients elsewhere at every step, and λ steps among them; the device is a few steps behind."""
    blocks, steps = linear_blocks(), 10_000
    arena, sizes = Arena(blocks, steps), list[int]()
    gs = [GradientInPlace(b) for b in blocks]
    staging.observers.append(sizes.append)
    device.behind = 3
    try:
        with recorded() as seen:
            for step in range(steps):
                arena.next()
                if step % 20 == 10:
                    before = len(sizes)
                    vs = [torch.zeros(b.shape) for b in blocks]
                    backend.lambda_step(blocks, gs, vs, vs, LambdaOptions(0.1, 0.01))
                    assert len(sizes) - before <= 2 or step < 20
                before = len(sizes)
                backend.theta_step(blocks, gs, ThetaOptions())
                assert len(sizes) - before <= 1 or step == 0, step
                seen.clear()
                if step == 100:
                    known, tables = tensors(), (len(uploads._tables), len(uploads._schedules), len(device.pinned))
    finally:
        staging.observers.remove(sizes.append)
    assert tensors() <= known + 5
    assert (len(uploads._tables), len(uploads._schedules), len(device.pinned)) == tables
    assert len(device.pinned) == staging.RING and device.waits == 0
    assert len(blocks[0].kept(TritonState).plans) == 2
