"""What every likelihood has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Nll = TypeVar("Nll", bound=Callable[..., Tensor])


class Likelihood(nn.Module):
    """Base class. A user's own implements ``nll`` and ``draw``; ``fisher_product`` then comes from autograd.

    A subclass's ``nn.Parameter``s (a learned noise level, say) are trained along with the model's.
    """

    scored: Tensor | None = None  # the mask of what ``nll`` last scored in training, where it leaves positions out
    noted: tuple[Tensor, torch.Size] | None = None  # the targets that ``nll`` was last given in training, and the
    # shape of the outputs that they were for

    def nll(self, targets: Tensor, outputs: Tensor) -> Tensor:
        """Mean negative log-likelihood of ``targets`` under the model's ``outputs``: a scalar."""
        raise NotImplementedError(f"{type(self).__name__} should implement nll(targets, outputs)")

    def note(self, targets: Tensor, outputs: Tensor) -> None:
        """Remember the targets of outputs that require a gradient, one tensor of as many rows. ``nll`` calls it: where
        the training's loss is that of this likelihood, FishLeg knows how far a step may go (``step_limit``).
        """
        trained = outputs.requires_grad and torch.is_grad_enabled() and not transformed()
        if trained and isinstance(targets, Tensor) and targets.shape[:1] == outputs.shape[:1]:
            self.noted = targets.detach(), outputs.shape

    def _note_for(self, kind: type[Likelihood], targets: Tensor, outputs: Tensor) -> None:
        """``note`` where nll is that class's own: a subclass's may have given it other targets than its own are."""
        if type(self).nll is kind.nll:
            self.note(targets, outputs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "noted": None}  # which nobody wants copied, or in a file

    def draw(self, outputs: Tensor) -> Tensor:
        """Targets sampled from the distribution that ``outputs`` stand for, from torch's global generator."""
        raise NotImplementedError(f"{type(self).__name__} should implement draw(outputs)")

    def terms(self, outputs: Tensor) -> int:
        """Over how many independent terms ``nll`` is the mean. Here: the batch size."""
        return batch_size(outputs)

    def fisher_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        """H v, with H the Fisher matrix of ``nll`` with respect to ``outputs``; both of the outputs' shape.

        Here: the Hessian of the nll on drawn targets, which equals H in expectation (and exactly, where it does not
        depend on the targets, as in an exponential family's natural parameters). A piecewise linear nll has no such
        Hessian: its likelihood implements a product of its own.
        """
        outputs = outputs.detach()
        with torch.no_grad():
            targets = self.draw(outputs)
        with torch.enable_grad():
            leaf = outputs.requires_grad_()
            (gradient,) = torch.autograd.grad(self.nll(targets, leaf), leaf, create_graph=True)
            (product,) = torch.autograd.grad(gradient, leaf, v, materialize_grads=True)
        return product.detach()

    def own_fisher_product(self, outputs: Tensor, vs: Sequence[Tensor]) -> list[Tensor]:
        """F v for the likelihood's own trainable parameters, in the order of ``parameters()``; uncorrelated with the
        outputs'.
        """
        if not vs:
            return []
        raise NotImplementedError(
            f"{type(self).__name__} has parameters of its own: implement own_fisher_product(outputs, vs), or "
            f"use fisher='hessian'"
        )

    def mask_of(self, args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
        """Which positions of the outputs count in the loss, of what the model was called with: a boolean tensor; None:
        all, or those that ``scored`` tells. Here: None.
        """
        return None

    def targets_behind(self, outputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor] | None:
        """The targets, and whether it is so, a boolean scalar, of a loss whose ``gradient`` with respect to ``outputs``
        is this likelihood's up to a factor; None where a gradient does not tell them. Here: None.
        """
        return None

    @torch.enable_grad()
    def explains(self, targets: Tensor, outputs: Tensor, gradient: Tensor) -> Tensor:
        """Whether ``gradient``, with respect to ``outputs``, may be of the nll on these targets, whatever each row's
        factor: a boolean scalar.
        """
        known = self.scored, self.noted
        try:
            leaf = outputs.detach().requires_grad_()
            (own,) = torch.autograd.grad(self.nll(targets, leaf), leaf)
        finally:
            self.scored, self.noted = known
        return alike(gradient, own, otherwise=True)

    def rows_between(self, outputs: Sequence[int]) -> int:
        """Each so many rows of outputs of that shape are enough to see what a gradient is of, if that is row by row."""
        if not getattr(type(self).nll, "of_each_row", False):
            return 1
        rows, positions = outputs[0], math.prod(self.positions(outputs))
        return min(positions // LOOKED_AT, rows // LEAST_ROWS) + 1

    def positions(self, outputs: Sequence[int]) -> Sequence[int]:
        """The shape of a mask for outputs of a shape. Here: theirs."""
        return torch.Size(outputs)

    def masked(self, mask: Tensor) -> Likelihood:
        """This likelihood with the positions of a boolean mask alone: those that ``mask_of`` or ``scored`` has told."""
        raise NotImplementedError(f"{type(self).__name__} has masks: implement masked(mask)")

    def doubt(self, outputs: Tensor) -> str | None:
        """What the user should be warned of, once, where a model makes such outputs. Here: nothing."""
        return None

    def forward(self, targets: Tensor, outputs: Tensor) -> Tensor:
        """``nll``: a likelihood can stand where a loss module does, but mind the order."""
        return self.nll(targets, outputs)


def of_each_row(nll: Nll) -> Nll:
    """Mark an ``nll`` that is a sum, or a mean, over rows."""
    nll.of_each_row = True  # type: ignore[attr-defined]
    return nll


LOOKED_AT, LEAST_ROWS = 256, 8  # positions, and samples, to see what a gradient is of


def alike(gradient: Tensor, expected: Tensor, least: float = 0.9, otherwise: bool = False) -> Tensor:
    """Whether rows point the same way, whatever each one's weight: their mean cosine, of those that count;
    ``otherwise`` where none does.
    """
    gradient, expected = (t.unsqueeze(-1).flatten(1).float() for t in (gradient, expected))
    counts = (gradient != 0).any(1)
    cosines = torch.cosine_similarity(gradient, expected, dim=1, eps=1e-30)
    same = (cosines * counts).sum() > least * counts.sum().clamp_min(1)
    return same | ~counts.any() if otherwise else same


def transformed() -> bool:
    """Whether this runs inside a transform of torch.func, whose tensors must not leave it."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def batch_size(outputs: Tensor) -> int:
    """How many samples the outputs have; ValueError where they are a scalar, a loss for one."""
    if outputs.ndim == 0:
        raise ValueError(
            "outputs should have a dimension for the batch but are a scalar: a likelihood scores the model's outputs "
            "(logits, means) and not its loss. Let the model return those, or give FishLeg draw= and nll= in the place "
            "of likelihood="
        )
    return outputs.shape[0]
