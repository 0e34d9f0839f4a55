"""Targets that are classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import LOOKED_AT, Likelihood, alike, batch_size, of_each_row
from .checks import called_with, check_pair, misfit


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
        batch_size(outputs)
        if not -outputs.ndim <= self.class_dim < outputs.ndim:
            raise ValueError(
                f"outputs should have dimension {self.class_dim} for the classes but has shape: "
                f"{tuple(outputs.shape)}; CategoricalLikelihood(class_dim=…) tells which dimension they are along"
            )
        return outputs.movedim(self.class_dim, -1)

    def _class_weight(self, outputs: Tensor) -> Tensor | None:
        return None if self.weight is None else self.weight.to(outputs)

    @of_each_row
    def nll(self, targets: Tensor, outputs: Tensor) -> Tensor:
        check_pair("CategoricalLikelihood", targets, outputs)
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
        return targets, alike(rows.flatten(0, -2)[::some], expected)

    def mask_of(self, args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
        """What ``loss_mask`` tells of them. TypeError where that is no boolean tensor, or it does not take them."""
        if self.loss_mask is None:
            return None
        try:
            mask = self.loss_mask(*args, **kwargs)
        except TypeError as error:
            if why := misfit(self.loss_mask, args, kwargs):
                raise TypeError(
                    f"loss_mask should take what the model is called with, {called_with(args, kwargs)}, but cannot: "
                    f"{why}; loss_mask=lambda *args, **kwargs: … takes any call"
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
        batch_size(outputs)
        return outputs.numel() // outputs.shape[self.class_dim]

    def fisher_product(self, outputs: Tensor, v: Tensor) -> Tensor:
        """ω∘(p∘v − p pᵀv), ω = 1/positions, or (Σ_c p_c w_c) over its sum where classes are weighted."""
        batch_size(outputs)
        p = torch.softmax(outputs, dim=self.class_dim)
        product = p * (v - (p * v).sum(self.class_dim, keepdim=True))
        weight = self._class_weight(outputs)
        if weight is None:
            return product / self.terms(outputs)
        omega = (self._classes_last(p) * weight).sum(-1).unsqueeze(self.class_dim)
        return omega / omega.sum() * product


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
