"""What the optimizer tells of itself: counters, the latest step in numbers, steps skipped, a writer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .model.block import Block

_SKIPPED = "FishLeg skipped a step: {}. diagnostics() counts such steps from here on"


class Diagnostics:
    """Counters and the numbers of the latest step. With ``on_device`` they stay on the device until they are read."""

    def __init__(self, on_device: bool, writer: Any) -> None:
        self._on_device, self._writer = on_device, writer
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
        self._counts = {name: saved[name] for name in self._counts}
        self._seen = self.counts()

    def note_gradient(self, norm: Tensor) -> None:
        """‖g‖ of this step."""
        self._last["grad_norm"] = norm

    def note_anchor(self) -> None:
        """Q was estimated anew."""
        self._counts["anchors"] += 1

    def note_update(self, blocks: Sequence[Block], loss: Tensor, ok: Tensor) -> None:
        """An update of λ, and whether it was taken. RuntimeError where the λ of ``blocks`` had been spoilt before."""
        self._counts["aux_steps"] += 1
        self._last["aux_loss"] = loss
        if self._on_device:
            self._counts["skipped_aux_steps"] = self._counts["skipped_aux_steps"] + ~ok
        elif not ok:
            _refuse_bad_aux(blocks)
            self._counts["skipped_aux_steps"] += 1

    def note_step(self, blocks: Sequence[Block], stepped: Sequence[Block], norms: Tensor, ok: Tensor) -> None:
        """A θ step of ``stepped``, and whether it was taken. RuntimeError where the λ of ``blocks`` is spoilt."""
        self._counts["steps"] += 1
        self._last["nat_norm"] = ([b.name for b in stepped], norms)
        if self._on_device:
            self._counts["skipped_steps"] = self._counts["skipped_steps"] + ~ok
        elif not ok:
            _refuse_bad_aux(blocks)
            self.skip_step("the natural gradient is not finite")

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
        self._counts = dict(self._seen)
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
