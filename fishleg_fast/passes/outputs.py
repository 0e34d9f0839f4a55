"""What of a model's outputs the likelihood scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .inputs import shape_of


def output_tensor(outputs: Any) -> Tensor:
    """The tensor a likelihood scores: the output itself, its ``logits``, or the first of a tuple that is no scalar, as
    in (logits, loss). TypeError otherwise.
    """
    found = getattr(outputs, "logits", outputs)
    if isinstance(found, Mapping):
        found = found.get("logits")
    elif isinstance(found, (tuple, list)):
        found = next((t for t in found if isinstance(t, Tensor) and t.ndim and t.is_floating_point()), None)
    if not isinstance(found, Tensor):
        raise TypeError(
            "the model's output should be a tensor, have one as .logits or ['logits'], or be a tuple with one, but is: "
            f"{type(outputs).__name__}; pass draw and nll functions of your own with fisher='hessian' and no likelihood"
        )
    return found


def left_out(outputs: Any, scored: Tensor) -> list[Tensor]:
    """What a tuple has beside the tensor that is scored, and might be another head's: of as many samples, on the graph.

    Where the scored one has a name it was meant.
    """
    if not isinstance(outputs, (tuple, list)) or hasattr(outputs, "logits"):
        return []
    heads = [t for t in outputs if isinstance(t, Tensor) and t is not scored and t.requires_grad]
    return [t for t in heads if shape_of(t)[:1] == shape_of(scored)[:1] != ()]
