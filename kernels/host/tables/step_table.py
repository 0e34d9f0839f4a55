"""What changes from step to step, as one small table on the device: addresses of tensors, and numbers.

Rows say where in it an address is (fields marked * in ``row_layout.BlockFields``), so that they themselves stay as they
are: gradients are elsewhere at every step. The table is copied to the device when it differs from the last one.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .staging import send

_address = Tensor.data_ptr


class Told(NamedTuple):
    """A tensor whose address a step tells, and the number of that address. The tensor tells layouts, no more."""

    tensor: Tensor
    number: int


class Sources:
    """Addresses that rows point to, by number.

    0 is no tensor's; then of each of the step's tensors; then of views of these. Negative ones are of memory that stays
    where it is.
    """

    def __init__(self, tensors: int) -> None:
        self._tensors = tensors  # how many a step has
        self._views: list[tuple[int, int]] = []  # (number, bytes from there)
        self._fixed: list[int] = []

    def __len__(self) -> int:
        return 1 + self._tensors + len(self._views)

    def step(self, at: int, t: Tensor, view: Tensor | None = None) -> Told:
        """The step's tensor number ``at``, from 0, which is t now; or a view of it."""
        told = Told(t, 1 + at)
        return told if view is None else self._view(told, view)

    def fixed(self, t: Tensor) -> Told:
        """Memory that stays where it is as long as these hold."""
        self._fixed.append(_address(t))
        return Told(t, -len(self._fixed))

    def rows(self, told: Told, rows: slice) -> Told:
        """Rows of one of the step's tensors."""
        return self._view(told, told.tensor[rows])

    def _view(self, told: Told, view: Tensor) -> Told:
        number, offset = told.number, _address(view) - _address(told.tensor)
        if not offset:
            return Told(view, number)
        if number > self._tensors:
            number, before = self._views[number - 1 - self._tensors]
            offset += before
        self._views.append((number, offset))
        return Told(view, len(self) - 1)

    def table(self, device: torch.device, numbers: int = 0) -> StepTable:
        """For these, and so many numbers."""
        return StepTable(device, self._fixed, len(self), numbers)

    def addresses(self, found: Sequence[int]) -> list[int]:
        """From those of a step's tensors."""
        given = [0, *found]
        return given + [given[number] + offset for number, offset in self._views] if self._views else given


class StepTable:
    """Addresses that stay, ``addresses`` that a step tells, then ``numbers`` in float32.

    For the steps of one stream, which their kernels run on.
    """

    def __init__(self, device: torch.device, fixed: Sequence[int], addresses: int, numbers: int) -> None:
        self._memory = torch.zeros(addresses + -(-numbers // 2) + len(fixed), dtype=torch.int64, device=device)
        told = addresses + -(-numbers // 2)
        self.start = self._memory.data_ptr()
        self.fixed_start = self.start + 8 * told
        self.numbers_start = self.start + 8 * addresses
        self.numbers = self._memory[addresses:told].view(torch.float32)
        self._bytes = self._memory.view(torch.uint8)
        self._told: bytes | None = None
        if fixed:
            send(array("q", fixed).tobytes(), self._memory[told:])

    def places(self, numbers: Tensor) -> Tensor:
        """Where on the device the addresses of those numbers are."""
        return torch.where(numbers < 0, self.fixed_start - 8 * (numbers + 1), self.start + 8 * numbers)

    def tell(self, addresses: Sequence[int], numbers: Sequence[float] = ()) -> None:
        """What kernels that are launched from now on read."""
        told = array("q", addresses).tobytes() + array("f", numbers).tobytes()
        if told != self._told:
            send(told, self._bytes[: len(told)])
            self._told = told
