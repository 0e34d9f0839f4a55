"""The hyperparameters of a θ step: one record for the rows of one parameter group that were stepped as often."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from operator import attrgetter

import torch
from torch import Tensor

from ....backends.protocol import ThetaOptions
from ....backends.reference import theta_update
from ....model.block import Block
from ...device.row_layout import H

Member = tuple[int, int, int]  # a row's block, and the first and the last of its parts: the weight's and the bias's
SIZE = 4 * H.LENGTH  # of a record, in bytes
_version = attrgetter("_version")


def rate_on_device(group: dict, device: torch.device) -> Tensor | None:
    """The group's learning rate, if kernels can read it where it is."""
    lr = group["lr"]
    return lr if isinstance(lr, Tensor) and lr.device == device and lr.dtype == torch.float32 else None


class Hyperparameters:
    """Of a plan's rows. ``counted``: the blocks whose steps the device counts."""

    def __init__(
        self,
        blocks: Sequence[Block],
        members: Sequence[Member],
        options: ThetaOptions,
        counted: Collection[int],
        device: torch.device,
    ) -> None:
        self._options, self._device = options, device
        kinds: dict[tuple, int] = {}  # rows of the same groups share a record
        self._examples: list[Member] = []
        self._kinds: list[int] = []  # of each row
        self._blocks = [block for block, _, _ in members]
        self._host = sorted(set(self._blocks).difference(counted))  # blocks whose steps the host counts
        self._counted = frozenset(counted)
        for block, first, last in members:
            groups = blocks[block].groups
            key = (id(groups[0]), id(groups[first]), id(groups[last]), block in self._counted)
            if key not in kinds:
                kinds[key] = len(kinds)
                self._examples.append((block, first, last))
            self._kinds.append(kinds[key])
        self._together = [SIZE * kind for kind in self._kinds]
        self._counts: list[float] = []  # of the blocks of ``_host``, at those versions
        self._versions: list[int] = []

    @property
    def most(self) -> int:
        """Numbers at most."""
        return H.LENGTH * len(self._kinds)

    def records(self, blocks: Sequence[Block], steps: Sequence[Tensor]) -> tuple[list[float], list[int]]:
        """(records, the offset of each row's among them in bytes), as groups and counters are now.

        steps: each block's counter.
        """
        counts = self._counted_steps([steps[i] for i in self._host])
        t = counts[0] if counts else 0.0
        if counts.count(t) == len(counts):
            return [x for example in self._examples for x in self._record(blocks, example, t)], self._together
        of_block = dict(zip(self._host, counts, strict=True))
        numbers: dict[tuple[int, float], int] = {}
        found: list[float] = []
        for kind, block in zip(self._kinds, self._blocks, strict=True):
            key = kind, of_block.get(block, 0.0)
            if key not in numbers:
                numbers[key] = SIZE * len(numbers)
                found += self._record(blocks, self._examples[kind], key[1])
        return found, [
            numbers[kind, of_block.get(block, 0.0)] for kind, block in zip(self._kinds, self._blocks, strict=True)
        ]

    def _counted_steps(self, counters: Sequence[Tensor]) -> list[float]:
        """How often blocks were stepped; asked of tensors that were written to since other than by ``count``."""
        versions = list(map(_version, counters))
        if versions != self._versions:
            self._counts, self._versions = [c.item() for c in counters], versions
        return self._counts

    def count(self, steps: Sequence[Tensor], taken: bool) -> None:
        """The host has counted a step of all blocks, if it was taken."""
        self._counts = [c + taken for c in self._counts]
        self._versions = [steps[i]._version for i in self._host]

    def _record(self, blocks: Sequence[Block], example: Member, t: float) -> tuple[float, ...]:
        index, first, last = example
        groups = blocks[index].groups
        weight, bias, beta, times = groups[first], groups[last], groups[0]["beta"], self._options.averages
        lr, bias_lr = (0.0 if rate_on_device(g, self._device) is not None else float(g["lr"]) for g in (weight, bias))
        return H.pack(
            KEEP=beta**times, TAKE=1 - beta**times, RATE=1 - beta,
            CORRECTION=1.0 if index in self._counted else 1 - beta ** (t + times),
            LOG2_BETA=math.log2(beta) if beta > 0 else -math.inf, TIMES=times,
            LR=lr, DECAY=weight["weight_decay"], BIAS_LR=bias_lr, BIAS_DECAY=bias["weight_decay"],
            BASE_LR_SQUARED=groups[0]["base_lr"] ** 2, RMS=theta_update.RMS,
        )  # fmt: skip
