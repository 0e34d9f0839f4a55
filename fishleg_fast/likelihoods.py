"""Likelihoods: how a model's outputs are scored, sampled, and measured by their Fisher matrix.

A likelihood's ``nll`` fixes the scale of everything else: the Fisher matrix is that of the same loss, mean and all.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        trained = outputs.requires_grad and torch.is_grad_enabled() and not _transformed()
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
        return _batch(outputs)

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


def _transformed() -> bool:
    """Whether this runs inside a transform of torch.func, whose tensors must not leave it."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def _batch(outputs: Tensor) -> int:
    """How many samples the outputs have; ValueError where they are a scalar, a loss for one."""
    if outputs.ndim == 0:
        raise ValueError(
            "outputs should have a dimension for the batch but are a scalar: a likelihood scores the model's outputs "
            "(logits, means) and not its loss. Let the model return those, or give FishLeg draw= and nll= in the place "
            "of likelihood="
        )
    return outputs.shape[0]


def _remedy(name: str, value: Any) -> str:
    """How to get at the logits of what a model has returned."""
    if name != "outputs":
        return ""
    if isinstance(value, (tuple, list)):
        return "; pass the logits, outputs[0] say"
    if isinstance(value, Mapping) or hasattr(value, "logits"):
        return "; pass the logits, outputs['logits'] or outputs.logits say"
    return ""


def _check_pair(kind: str, targets: Tensor, outputs: Tensor) -> None:
    """What both a swapped call and a wrong dtype break."""
    for name, t in (("targets", targets), ("outputs", outputs)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} should be a tensor but is: {type(t).__name__}{_remedy(name, t)}")
    if not outputs.is_floating_point():
        raise TypeError(
            f"outputs should be floating point but has dtype {outputs.dtype}; {kind}.nll takes (targets, "
            f"outputs), in this order"
        )
    if targets.requires_grad and not outputs.requires_grad:
        raise ValueError(
            f"targets requires a gradient and outputs does not; {kind}.nll takes (targets, outputs), in this order"
        )
    _batch(outputs)
    if outputs.numel() == 0:
        raise ValueError(f"outputs should not be empty but has shape: {tuple(outputs.shape)}")


def _check_elementwise(kind: str, targets: Tensor, outputs: Tensor) -> None:
    _check_pair(kind, targets, outputs)
    if targets.shape != outputs.shape:
        raise ValueError(
            f"targets and outputs should have one shape but have: {tuple(targets.shape)} and {tuple(outputs.shape)}; "
            f"{kind}.nll takes (targets, outputs), in this order"
        )


class GaussianLikelihood(Likelihood):
    """y ~ N(outputs, σ²I). nll sums over the output's dimensions and means over the batch, constants included.

    Args:
        sigma: σ > 0, in the targets' units; ValueError otherwise.
        learn: make σ a trainable parameter, ``log_sigma``.
    """

    def __init__(self, sigma: float = 1.0, learn: bool = False) -> None:
        super().__init__()
        if not (isinstance(sigma, (int, float)) and 0 < sigma < math.inf):
            raise ValueError(f"sigma should be a positive number but is: {sigma!r}")
        self._fixed = float(sigma)
        self.log_sigma = nn.Parameter(torch.tensor(math.log(sigma))) if learn else None

    @property
    def sigma(self) -> Tensor:
        """σ: a scalar tensor."""
        return torch.tensor(self._fixed, device="cpu") if self.log_sigma is None else self.log_sigma.detach().exp()

    def nll(self, targets: Tensor, outputs: Tensor) -> Tensor:
        _check_elementwise("GaussianLikelihood", targets, outputs)
        self._note_for(GaussianLikelihood, targets, outputs)
        log_sigma: Tensor | float = math.log(self._fixed)
        precision: Tensor | float = self._fixed**-2
        if self.log_sigma is not None:
            log_sigma = self.log_sigma.to(outputs.device)
            precision = torch.exp(-2 * log_sigma)
        batch = outputs.shape[0]
        squares = (targets - outputs).square().sum() * precision
        return 0.5 * squares / batch + outputs.numel() / batch * (log_sigma + 0.5 * math.log(2 * math.pi))

    def draw(self, outputs: Tensor) -> Tensor:
        return outputs + self.sigma.to(outputs) * torch.randn_like(outputs)

    def fisher_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        """v/(σ²B)"""
        precision = self._fixed**-2 if self.log_sigma is None else torch.exp(-2 * self.log_sigma.detach()).to(v)
        return v * precision / _batch(outputs)

    def own_fisher_product(self, outputs: Tensor, vs: Sequence[Tensor]) -> list[Tensor]:
        """2D v for log σ, D the dimensions of one output."""
        return [2 * outputs.numel() / _batch(outputs) * v for v in vs]


_ROUNDING = 1e-4  # of grey values that were resized or averaged


def _looked_at(t: Tensor) -> bool:
    """Whether its values may be: a GPU would be waited for, and a trace, a transform or a fake tensor has none."""
    if type(t) not in (Tensor, nn.Parameter):
        return False
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return t.device.type == "cpu" and not traced and not _transformed()


LOOKED_AT = 256  # positions, to see what a gradient is of


def _alike(gradient: Tensor, expected: Tensor, least: float = 0.9) -> Tensor:
    """Whether rows point the same way, whatever each one's weight: their mean cosine, of those that count."""
    gradient, expected = gradient.flatten(1).float(), expected.flatten(1).float()
    counts = (gradient != 0).any(1)
    cosines = torch.cosine_similarity(gradient, expected, dim=1, eps=1e-30)
    return (cosines * counts).sum() > least * counts.sum().clamp_min(1)


class BernoulliLikelihood(Likelihood):
    """Independent y ∈ {0, 1} (or a grey value between) with logits ``outputs``, what a sigmoid makes probabilities of.

    nll sums over dimensions and means over the batch. A model that ends in a sigmoid should return what that is given.
    On a CPU a target outside [0, 1] raises a ValueError.
    """

    def nll(self, targets: Tensor, outputs: Tensor) -> Tensor:
        _check_elementwise("BernoulliLikelihood", targets, outputs)
        if _looked_at(targets):
            least, most = map(float, targets.aminmax())
            if least < -_ROUNDING or most > 1 + _ROUNDING:
                raise ValueError(
                    f"targets should be in [0, 1] but are from {least:.4g} to {most:.4g}; scale them to it (pixels / "
                    "255, no normalization), or use GaussianLikelihood where they have no bounds"
                )
        self._note_for(BernoulliLikelihood, targets, outputs)
        loss = F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="sum")
        return loss / outputs.shape[0]

    def targets_behind(self, outputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor] | None:
        """Binary cross entropy's gradient p − y is negative where y is 1. Grey values are not told by it."""
        if type(self).nll is not BernoulliLikelihood.nll:
            return None
        targets, some = (gradient < 0).to(outputs.dtype), len(outputs) // LOOKED_AT + 1
        expected = torch.sigmoid(outputs[::some].float()) - targets[::some]
        return targets, _alike(gradient[::some].reshape(1, -1), expected.reshape(1, -1), 0.95)  # signs agree anyway

    def draw(self, outputs: Tensor) -> Tensor:
        p = torch.sigmoid(outputs)
        return (torch.rand_like(p) < p).to(p.dtype)  # torch.bernoulli would stop at outputs that are not finite

    def fisher_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        """p(1−p)∘v/B"""
        p = torch.sigmoid(outputs)
        return p * (1 - p) * v / _batch(outputs)


class CategoricalLikelihood(Likelihood):
    """Integer targets with logits ``outputs``; nll is ``torch.nn.functional.cross_entropy``'s mean.

    Args:
        class_dim: the outputs' dimension of the classes: 1 as in torch, (B, C) or (B, C, H, W), targets (B,) or (B, H,
            W); -1 for language models, (B, T, V) with targets (B, T). None: 1, of which FishLeg warns where outputs
            have three dimensions, unless targets that ``nll`` was given have shown that it is right.
        ignore_index: targets that do not count. The Fisher matrix and its number of terms leave out the positions that
            ``nll`` left out when it last scored outputs that require a gradient, if these are all of the model's.
        loss_mask: function of what the model is called with, ``loss_mask(*args, **kwargs)``, that returns the positions
            that count, a boolean tensor shaped as the targets, or None for all. Needed where the training's loss is not
            ``nll`` of this likelihood: padding in the inputs, labels among them.
        weight: of each class (C,), as in torch. The Fisher matrix then is that of the weighted loss, position i
            weighing Σ_c p_ic w_c.
    """

    _class_dim_known = True  # of those that were pickled before there was this

    def __init__(
        self,
        class_dim: int | None = None,
        ignore_index: int = -100,
        weight: Tensor | None = None,
        loss_mask: Callable[..., Tensor | None] | None = None,
    ) -> None:
        super().__init__()
        self._class_dim_known = class_dim is not None
        class_dim = 1 if class_dim is None else class_dim
        if isinstance(class_dim, bool) or not isinstance(class_dim, int):
            raise TypeError(f"class_dim should be an integer but is: {class_dim!r}")
        if weight is not None and (weight.ndim != 1 or not (weight >= 0).all()):
            raise ValueError(f"weight should be a vector of non-negative numbers but is: {weight}")
        if loss_mask is not None and not callable(loss_mask):
            raise TypeError(f"loss_mask should be a function of the model's inputs but is: {type(loss_mask).__name__}")
        self.class_dim, self.ignore_index, self.loss_mask = class_dim, ignore_index, loss_mask
        self.register_buffer("weight", weight)
        self.weight: Tensor | None

    def doubt(self, outputs: Tensor) -> str | None:
        """That dimension 1 was taken for the classes' where the last is as likely."""
        if self._class_dim_known or outputs.ndim != 3:
            return None
        shape = tuple(outputs.shape)
        return (
            f"CategoricalLikelihood takes the model's outputs, of shape {shape}, for logits of {shape[1]} classes at "
            f"{shape[2]} positions, as torch's cross_entropy does; where classes are last, (batch, time, classes) as "
            "in language models, pass class_dim=-1. class_dim=1 says that it is right as it is"
        )

    def _classes_last(self, outputs: Tensor) -> Tensor:
        _batch(outputs)
        if not -outputs.ndim <= self.class_dim < outputs.ndim:
            raise ValueError(
                f"outputs should have dimension {self.class_dim} for the classes but has shape: "
                f"{tuple(outputs.shape)}; CategoricalLikelihood(class_dim=…) tells which dimension they are along"
            )
        return outputs.movedim(self.class_dim, -1)

    def _class_weight(self, outputs: Tensor) -> Tensor | None:
        return None if self.weight is None else self.weight.to(outputs)

    def nll(self, targets: Tensor, outputs: Tensor) -> Tensor:
        _check_pair("CategoricalLikelihood", targets, outputs)
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise TypeError(
                f"targets should be integer class indices but has dtype {targets.dtype}; convert one-hot targets with "
                ".argmax(dim). CategoricalLikelihood.nll takes (targets, outputs), in this order"
            )
        logits = self._classes_last(outputs)
        if targets.shape != logits.shape[:-1]:
            raise ValueError(
                f"targets should have shape {tuple(logits.shape[:-1])} for outputs {tuple(outputs.shape)} with "
                f"classes along "
                f"dimension {self.class_dim} but has: {tuple(targets.shape)}; for (B, T, V) logits use "
                f"CategoricalLikelihood(class_dim=-1)"
            )
        if outputs.ndim == 3 and outputs.shape[1] != outputs.shape[2]:
            self._class_dim_known = True  # these targets would not fit the other one
        if outputs.requires_grad:
            self.scored = targets.detach() != self.ignore_index
        self._note_for(CategoricalLikelihood, targets, outputs)
        return F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            targets.reshape(-1).long(),
            weight=self._class_weight(outputs),
            ignore_index=self.ignore_index,
        )

    def draw(self, outputs: Tensor) -> Tensor:
        logits = self._classes_last(outputs)
        if 0 <= self.ignore_index < logits.shape[-1]:  # a class that the nll would not count
            logits = logits.index_fill(-1, torch.tensor(self.ignore_index, device=logits.device), -math.inf)
        p = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        # The first of C exponential clocks of rates p. torch.multinomial would stop at outputs that are not finite.
        return (p / torch.empty_like(p).exponential_()).argmax(dim=-1)

    def targets_behind(self, outputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cross entropy's gradient p − 1[class] is negative at the target alone, and zero where a position does not
        count. Whether that is so is seen at some positions.
        """
        if type(self).nll is not CategoricalLikelihood.nll:
            return None
        rows = self._classes_last(gradient)
        least, targets = rows.min(-1)
        targets = torch.where(least < 0, targets, self.ignore_index)
        some = targets.numel() // LOOKED_AT + 1
        classes = targets.flatten()[::some]
        p = torch.softmax(self._classes_last(outputs).flatten(0, -2)[::some].float(), -1)
        counts = classes != self.ignore_index
        expected = (p - F.one_hot(classes * counts, p.shape[-1])) * counts[:, None]
        return targets, _alike(rows.flatten(0, -2)[::some], expected)

    def mask_of(self, args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
        """What ``loss_mask`` tells of them. TypeError where that is no boolean tensor, or it does not take them."""
        if self.loss_mask is None:
            return None
        try:
            mask = self.loss_mask(*args, **kwargs)
        except TypeError as error:
            if misfit := _misfit(self.loss_mask, args, kwargs):
                raise TypeError(
                    f"loss_mask should take what the model is called with, {_called_with(args, kwargs)}, but cannot: "
                    f"{misfit}; loss_mask=lambda *args, **kwargs: … takes any call"
                ) from error
            raise
        if mask is not None and not (isinstance(mask, Tensor) and mask.dtype == torch.bool):
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"loss_mask should return a boolean tensor or None but returned: {kind}")
        return mask

    def positions(self, outputs: Sequence[int]) -> Sequence[int]:
        """Without the classes'."""
        classes = self.class_dim % max(len(outputs), 1)
        return torch.Size([*outputs[:classes], *outputs[classes + 1 :]])

    def masked(self, mask: Tensor) -> Likelihood:
        """Of the positions that a mask (as the targets) has. Targets drawn and scored are those positions' (count,)."""
        return _MaskedCategorical(self, mask)

    def terms(self, outputs: Tensor) -> int:
        _batch(outputs)
        return outputs.numel() // outputs.shape[self.class_dim]

    def fisher_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        """ω∘(p∘v − p pᵀv), ω = 1/positions, or (Σ_c p_c w_c) over its sum where classes are weighted."""
        _batch(outputs)
        p = torch.softmax(outputs, dim=self.class_dim)
        product = p * (v - (p * v).sum(self.class_dim, keepdim=True))
        weight = self._class_weight(outputs)
        if weight is None:
            return product / self.terms(outputs)
        omega = (self._classes_last(p) * weight).sum(-1).unsqueeze(self.class_dim)
        return omega / omega.sum() * product


def _misfit(function: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> str | None:
    """Why a function cannot be called like that; None where it can, or nobody knows."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    except ValueError:  # some builtin functions have no signature
        pass
    return None


def _called_with(args: tuple, kwargs: Mapping[str, Any]) -> str:
    """The types of arguments: ``(Tensor, labels=Tensor)``."""
    named = [f"{name}={type(x).__name__}" for name, x in kwargs.items()]
    return f"({', '.join([*(type(x).__name__ for x in args), *named])})"


class _MaskedCategorical(Likelihood):
    """Some positions' alone."""

    def __init__(self, whole: CategoricalLikelihood, mask: Tensor) -> None:
        super().__init__()
        self._whole, self._shape = [whole], mask.shape  # in a list: no submodule
        self._places = mask.flatten().nonzero()[:, 0]
        self._each = CategoricalLikelihood(-1, whole.ignore_index, whole.weight)

    def _rows(self, outputs: Tensor) -> Tensor:
        """The logits of the positions that count, (count, C)."""
        logits = self._whole[0]._classes_last(outputs)
        if logits.shape[:-1] != self._shape:
            raise ValueError(
                f"loss_mask should return a mask of shape {tuple(logits.shape[:-1])} for outputs "
                f"{tuple(outputs.shape)} but returned one of: {tuple(self._shape)}"
            )
        return logits.reshape(-1, logits.shape[-1]).index_select(0, self._places.to(outputs.device))

    def nll(self, targets: Tensor, outputs: Tensor) -> Tensor:
        rows = self._rows(outputs)
        return self._each.nll(targets, rows) if rows.shape[0] else rows.sum()

    def draw(self, outputs: Tensor) -> Tensor:
        return self._each.draw(self._rows(outputs))

    def terms(self, outputs: Tensor) -> int:
        return self._places.shape[0]

    def fisher_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        rows = self._rows(outputs)
        found = torch.zeros_like(outputs)
        if rows.shape[0]:
            product = self._each.fisher_product(rows, self._rows(v))
            whole = self._whole[0]._classes_last(found)  # a view
            whole[self._places_of(whole)] = product
        return found

    def _places_of(self, whole: Tensor) -> tuple[Tensor, ...]:
        return torch.unravel_index(self._places.to(whole.device), self._shape)
