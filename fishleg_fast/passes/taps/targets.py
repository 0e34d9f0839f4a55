"""What a batch was trained on: as the likelihood's nll was given it, or as the loss's gradient tells."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...likelihoods import Likelihood
from ..outputs import output_tensor
from .inputs import InputTap


class TargetTap:
    """The targets of the latest call of the model that the input tap has seen.

    ``open``: whether to look at the gradient with respect to the model's outputs, where nll is not what is trained on;
    where it is, whether the gradient may be that of the targets that nll was given.
    """

    def __init__(self, likelihood: Likelihood, inputs: InputTap) -> None:
        self._likelihood, self.open = likelihood, False
        self._found: tuple[Tensor, Tensor] | None = None  # what a gradient told, and whether it did
        self._some: tuple[int, Tensor, Tensor] | None = None  # of each so many rows the outputs, and their gradient
        self._shape: tuple[int, ...] = ()  # of the outputs with that
        self._calls = 0
        inputs.listeners.add(self)

    def called(self) -> None:
        """The model is called: what is known of earlier calls is of other inputs."""
        self._calls += 1
        self._found = self._some = self._likelihood.noted = None

    def returned(self, outputs: Any) -> None:
        """What the model returned: of what the likelihood scores the gradient is looked at."""
        if not self.open:
            return
        try:
            scored = output_tensor(outputs)
        except TypeError:  # which the step will tell
            return
        if scored.grad_fn is None or not scored.ndim:  # hooks on a leaf would stay
            return
        tap, call, there = weakref.ref(self), self._calls, scored.detach()

        @torch.no_grad()
        def look(gradient: Tensor) -> None:
            mine = tap()
            if mine is not None and mine._calls == call:
                mine._look(there, gradient)

        scored.register_hook(look)

    def _look(self, outputs: Tensor, gradient: Tensor) -> None:
        self._shape, self._found, self._some = tuple(outputs.shape), None, None
        noted = self._likelihood.noted
        if noted is not None and tuple(noted[1]) == self._shape:
            every = self._likelihood.rows_between(self._shape)
            self._some = every, outputs[::every].clone(), gradient[::every].clone()
            return
        try:
            self._found = self._likelihood.targets_behind(outputs, gradient)
        except (ValueError, RuntimeError):  # outputs that are no such likelihood's, which the step will tell
            pass

    def of(self, outputs: Sequence[tuple[int, ...]]) -> Tensor | None:
        """The targets where they are known, of outputs of these shapes. Waits for the device where a gradient told."""
        noted = self._likelihood.noted
        if noted is not None and tuple(noted[1]) in outputs:
            return noted[0] if self._agrees(noted[0]) else None
        if self._found is not None and self._shape in outputs and bool(self._found[1]):
            return self._found[0]
        return None

    def _agrees(self, targets: Tensor) -> bool:
        """Whether the gradient that was seen, if one was, may be that of the nll on these targets: not where they were
        of other outputs, another head's or model's, or in another order.
        """
        if self._some is None:
            return True
        every, outputs, gradient = self._some
        self._some = None
        try:
            right = bool(self._likelihood.explains(targets[::every], outputs, gradient))
        except RuntimeError:  # an nll without a gradient by its outputs, say: then it is believed
            return True
        if not right:
            self._likelihood.noted = None
        return right
