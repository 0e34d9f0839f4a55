"""What the optimizer tells of itself: counters, the latest step in numbers, steps skipped, a writer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .model.block import Block

_SKIPPED = "FishLeg skipped a step: {}. diagnostics() counts such steps from here on"


class Diagnostics:
    """Counters and the numbers of the latest step. With ``on_device`` they stay on the device until they are read.

    ``each``: takes a function that every rank runs, whose error is then an error on all of them.
    """

    def __init__(
        self, on_device: bool, writer: Any, each: Callable[[Callable[[], None]], None] = lambda check: check()
    ) -> None:
        self._on_device, self._writer, self._each = on_device, writer, each
        self._counts: dict[str, Any] = dict.fromkeys(
            ("steps", "aux_steps", "anchors", "skipped_steps", "skipped_aux_steps"), 0
        )
        self._seen: dict[str, int] = dict(self._counts)  # when the host last looked
        self._last: dict[str, Any] = {}
        self._notices: list[str] = []

    def note(self, message: str) -> None:
        """To be warned of when all is done: warnings may be errors, which must not stop a step half-way."""
        self._notices.append(message)

    def warn(self, stacklevel: int) -> None:
        """Warn of what was noted; ``stacklevel`` as that of ``warnings.warn`` here."""
        notices, self._notices = self._notices, []
        for k, message in enumerate(notices):
            try:
                warnings.warn(message, stacklevel=stacklevel + 1)
            except Warning:
                self._notices = notices[k + 1 :]
                raise

    @property
    def steps(self) -> int:
        """θ steps so far, those that were skipped on the device included."""
        return self._counts["steps"]

    def counts(self) -> dict[str, int]:
        """All counters, for a checkpoint."""
        return {k: int(v) for k, v in self._counts.items()}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take up a checkpoint's counters."""
        for name, known in self._counts.items():
            if isinstance(known, Tensor):
                known.fill_(saved[name])
            else:
                self._counts[name] = saved[name]
        self._seen = self.counts()

    def note_gradient(self, norm: Tensor) -> None:
        """‖g‖ of this step."""
        self._last["grad_norm"] = norm

    def note_estimate(self, name: str) -> None:
        """λ followed the Fisher matrix's factors: "anchors" or "aux_steps", a natural-gradient step."""
        self._counts[name] += 1

    def note_update(self, blocks: Sequence[Block], loss: Tensor, ok: Tensor) -> None:
        """An update of λ, and whether it was taken. RuntimeError where the λ of ``blocks`` had been spoilt before."""
        self._counts["aux_steps"] += 1
        self._last["aux_loss"] = loss
        if self._on_device:
            self._count_on_device("skipped_aux_steps", ~ok)
        elif not ok:
            self._each(lambda: _refuse_bad_aux(blocks))
            self._counts["skipped_aux_steps"] += 1

    def note_step(self, blocks: Sequence[Block], stepped: Sequence[Block], norms: Tensor, ok: Tensor) -> None:
        """A θ step of ``stepped``, and whether it was taken. RuntimeError where the λ of ``blocks`` is spoilt."""
        self._counts["steps"] += 1
        self._last["nat_norm"] = ([b.name for b in stepped], norms)
        if self._on_device:
            self._count_on_device("skipped_steps", ~ok)
        elif not ok:
            self._each(lambda: _refuse_bad_aux(blocks))
            self.skip_step("the natural gradient is not finite")

    def _count_on_device(self, name: str, more: Tensor) -> None:
        """In place, as a CUDA graph needs it."""
        if not isinstance(self._counts[name], Tensor):
            self._counts[name] = torch.full((), self._counts[name], dtype=torch.int64, device=more.device)
        self._counts[name].add_(more)

    def figures(self) -> dict[str, Any]:
        """The numbers of the latest θ step, where they are."""
        return {name: value for name, value in self._last.items() if name != "aux_loss"}

    def count_replay(self, figures: Mapping[str, Any]) -> None:
        """A CUDA graph takes a θ step, whose figures these are."""
        self._counts["steps"] += 1
        self._last.update(figures)

    def forget_steps(self, steps: int) -> None:
        """There were only so many after all."""
        self._counts["steps"] = steps

    def skip_step(self, reason: str) -> None:
        """A step was not taken. The first is to be warned of."""
        if not self._counts["skipped_steps"]:
            self.note(_SKIPPED.format(reason))
        self._counts["skipped_steps"] += 1

    def catch_up(self, blocks: Sequence[Block]) -> None:
        """Read what stayed on the device, where the host waits anyway. RuntimeError where the λ of ``blocks`` is
        spoilt.
        """
        seen, self._seen = self._seen, self.counts()
        skipped = self._seen["skipped_steps"] > seen["skipped_steps"]
        if skipped or self._seen["skipped_aux_steps"] > seen["skipped_aux_steps"]:
            _refuse_bad_aux(blocks)
        if skipped and not seen["skipped_steps"]:
            self.note(_SKIPPED.format("the gradient or the natural gradient was not finite"))

    @property
    def aux_loss(self) -> float:
        """𝒜 at the latest update of λ."""
        return float(self._last["aux_loss"])

    def report(self) -> dict[str, Any]:
        """As ``FishLeg.diagnostics`` has it."""
        names, norms = self._last.get("nat_norm", ([], torch.zeros(0, device="cpu")))
        scalars = {key: float(self._last[key]) if key in self._last else None for key in ("aux_loss", "grad_norm")}
        return {**self.counts(), **scalars, "nat_norm": dict(zip(names, norms.tolist(), strict=True))}

    def write(self) -> None:
        """Give the report to the writer, if there is one."""
        if self._writer is None:
            return
        for key, value in self.report().items():
            items = {f"{key}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
            for name, number in items.items():
                if number is not None:
                    self._writer.add_scalar(f"fishleg/{name}", number, self.steps)


def _refuse_bad_aux(blocks: Sequence[Block]) -> None:
    for block in blocks:
        for name, t in block.structure.fishleg_aux.items():
            if not torch.isfinite(t).all():
                raise RuntimeError(
                    f"λ of {block.name!r}, fishleg_aux[{name!r}], is not finite; load a checkpoint or make "
                    f"the optimizer anew"
                )
