"""Whether targets and outputs are what a likelihood takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .base import batch_size, transformed


def _remedy(name: str, value: Any) -> str:
    """How to get at the logits of what a model has returned."""
    if name != "outputs":
        return ""
    if isinstance(value, (tuple, list)):
        return "; pass the logits, outputs[0] say"
    if isinstance(value, Mapping) or hasattr(value, "logits"):
        return "; pass the logits, outputs['logits'] or outputs.logits say"
    return ""


def check_pair(kind: str, targets: Tensor, outputs: Tensor) -> None:
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
    batch_size(outputs)
    if outputs.numel() == 0:
        raise ValueError(f"outputs should not be empty but has shape: {tuple(outputs.shape)}")


def check_elementwise(kind: str, targets: Tensor, outputs: Tensor) -> None:
    check_pair(kind, targets, outputs)
    if targets.shape != outputs.shape:
        raise ValueError(
            f"targets and outputs should have one shape but have: {tuple(targets.shape)} and {tuple(outputs.shape)}; "
            f"{kind}.nll takes (targets, outputs), in this order"
        )


def looked_at(t: Tensor) -> bool:
    """Whether its values may be: a GPU would be waited for, and a trace, a transform or a fake tensor has none."""
    if type(t) not in (Tensor, nn.Parameter):
        return False
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return t.device.type == "cpu" and not traced and not transformed()


def misfit(function: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> str | None:
    """Why a function cannot be called like that; None where it can, or nobody knows."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    except ValueError:  # some builtin functions have no signature
        pass
    return None


def called_with(args: tuple, kwargs: Mapping[str, Any]) -> str:
    """The types of arguments: ``(Tensor, labels=Tensor)``."""
    named = [f"{name}={type(x).__name__}" for name, x in kwargs.items()]
    return f"({', '.join([*(type(x).__name__ for x in args), *named])})"
