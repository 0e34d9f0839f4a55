"""Products of the Fisher matrix of a model on a curvature batch with vectors.

F is the Fisher matrix of the mean loss, (1/N) Σ over the batch's N independent terms of Jᵀ H_out J.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ..passes.inputs import Inputs
from ..passes.isolated import IsolatedPasses

_IMPOSSIBLE = (
    "fisher='ggn' is impossible: an operation of the model has neither a forward nor a second derivative; "
    "choose fisher='antithetic' or 'rank1'"
)

Linearize = Callable[[IsolatedPasses, Sequence[tuple[Tensor, Tensor]], Inputs], tuple[Tensor, "Tensor | None"]]
Product = Callable[[IsolatedPasses, Sequence[Tensor], Sequence[Tensor], Inputs], list[Tensor]]


def gradients(outputs: Any, leaves: Sequence[Any], cotangents: Any = None, **options: Any) -> list[Tensor]:
    """By ``torch.autograd.grad``; zeros where the outputs do not depend on a leaf."""
    return list(torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True, materialize_grads=True, **options))


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """‖·‖ of all of them together, in at least float32."""
    return torch.linalg.vector_norm(
        torch.stack(
            [torch.linalg.vector_norm(t.detach(), dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
        )
    )


def ggn(passes: IsolatedPasses, params: Sequence[Tensor], vs: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
    """Jᵀ H_out J v: the Fisher matrix itself, by one forward pass that carries the tangent and one backward pass.

    Where an operation of the model has no forward derivative J v comes from differentiating Jᵀw by w instead, as exact.
    """
    seed = passes.seed()
    if passes.forward_mode:
        try:
            return passes.run(inputs, seed, lambda: linearized_ggn(passes, params, vs, inputs, forward_mode_product)[0])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # NotImplementedError is one; a fault of the model's own comes up again below
            reason = str(error).strip().splitlines()[0]
        try:
            products = passes.run(
                inputs, seed, lambda: linearized_ggn(passes, params, vs, inputs, _checked_double_backward)[0]
            )
        except NotImplementedError as error:
            raise RuntimeError(f"{_IMPOSSIBLE} ({reason} {error})") from error
        passes.forward_mode = False
        warnings.warn(
            f"fisher='ggn' differentiates twice from here on, since forward mode failed: {reason}", stacklevel=2
        )
        return products
    return passes.run(inputs, seed, lambda: linearized_ggn(passes, params, vs, inputs, _double_backward)[0])


def linearized_ggn(
    passes: IsolatedPasses,
    params: Sequence[Tensor],
    vs: Sequence[Tensor],
    inputs: Inputs,
    linearize: Linearize,
    edges: Callable[[], list[Any]] = list,
) -> tuple[list[Tensor], list[Tensor]]:
    """F v of the parameters, and Jᵀ H_out J v at the edges."""
    likelihood = passes.likelihood
    assert likelihood is not None
    noise = {id(p) for p in likelihood.parameters()}
    mine = [(p, v.to(p.dtype)) for p, v in zip(params, vs, strict=True) if id(p) not in noise]
    output, tangent = linearize(passes, mine, inputs)
    detached = output.detach()
    leaves: list[Any] = [p for p, _ in mine]
    found = [torch.zeros_like(p) for p in leaves]
    leaves += edges()
    if tangent is not None and leaves:
        cotangent = likelihood.fisher_product(detached, tangent.detach().to(output.dtype))
        found = gradients(output, leaves, cotangent)
    products, rest = iter(found[: len(mine)]), found[len(mine) :]
    own = iter(likelihood.own_fisher_product(detached, [v for p, v in zip(params, vs, strict=True) if id(p) in noise]))
    return [next(own) if id(p) in noise else next(products) for p in params], rest


def forward_mode_product(
    passes: IsolatedPasses, mine: Sequence[tuple[Tensor, Tensor]], inputs: Inputs
) -> tuple[Tensor, Tensor | None]:
    """The outputs, with their graph, and J v; None where they do not depend on the parameters."""
    with forward_ad.dual_level():
        duals = {id(p): forward_ad.make_dual(p, v) for p, v in mine}
        return forward_ad.unpack_dual(passes.replaced(duals, lambda: passes.outputs(inputs)))


def _double_backward(
    passes: IsolatedPasses, mine: Sequence[tuple[Tensor, Tensor]], inputs: Inputs, check: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The same by differentiating Jᵀw, linear in w, by w."""
    output, params = passes.outputs(inputs), [p for p, _ in mine]
    if not output.requires_grad or not params:
        return output, None
    w = torch.randn_like(output).requires_grad_()
    pulled = gradients(output, params, w, create_graph=True)
    curved = [(g, v) for g, (_, v) in zip(pulled, mine, strict=True) if g.requires_grad]
    tangent = gradients([g for g, _ in curved], [w], [v for _, v in curved], retain_graph=True)[0] if curved else None
    if check and tangent is not None:
        there = torch.sum(w.detach() * tangent).double()  # ⟨w, J v⟩
        back = torch.stack([torch.sum(g.detach() * v).double() for g, (_, v) in zip(pulled, mine, strict=True)])
        if (there - back.sum()).abs() > 1e-2 * back.abs().sum():
            raise RuntimeError(_IMPOSSIBLE)
    return output, tangent


def _checked_double_backward(
    passes: IsolatedPasses, mine: Sequence[tuple[Tensor, Tensor]], inputs: Inputs
) -> tuple[Tensor, Tensor | None]:
    """... and checked by ⟨w, J v⟩ = ⟨Jᵀw, v⟩: an opaque operation drops out of a second derivative without a word."""
    return _double_backward(passes, mine, inputs, check=True)


def hessian(passes: IsolatedPasses, params: Sequence[Tensor], vs: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
    """∇²ℓ v on drawn labels, by differentiating twice: F v in expectation."""

    def product() -> list[Tensor]:
        loss, _ = passes.drawn_loss(inputs)
        grads = gradients(loss, params, create_graph=True)
        curved = [(g, v.to(g.dtype)) for g, v in zip(grads, vs, strict=True) if g.requires_grad]
        if not curved:
            return [torch.zeros_like(p) for p in params]
        return gradients([g for g, _ in curved], params, [v for _, v in curved])

    return passes.run(inputs, passes.seed(), product)


def antithetic(passes: IsolatedPasses, params: Sequence[Tensor], vs: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
    """‖v‖ (∇ℓ(θ+εv̂) − ∇ℓ(θ−εv̂))/2ε on one set of drawn labels: F v in expectation, up to O(ε²).

    ε = ‖θ‖ ∛eps, eps that of the parameters' dtype: the balance of rounding and truncation. θ itself is never written
    to.
    """
    norm, size = _norm(vs), _norm(params)
    unit = max(torch.finfo(p.dtype).eps for p in params) ** (1 / 3)
    step = unit * torch.where(size > 0, size, 1) / torch.where(norm > 0, norm, 1)  # ε/‖v‖
    seed = passes.seed()
    labels = passes.run(inputs, seed, lambda: passes.draw(inputs))

    def side(sign: int) -> list[Tensor]:
        moved = [
            (p.detach() + (sign * step).to(v) * v).to(p.dtype).requires_grad_() for p, v in zip(params, vs, strict=True)
        ]
        named = {id(p): q for p, q in zip(params, moved, strict=True)}
        return passes.replaced(named, lambda: gradients(passes.nll(inputs, labels), moved))

    plus, minus = (passes.run(inputs, seed, partial(side, sign)) for sign in (1, -1))
    return [(a.to(v.dtype) - b) / (2 * step).to(v) for a, b, v in zip(plus, minus, vs, strict=True)]


def drawn_gradient(passes: IsolatedPasses, params: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
    """∇ℓ on labels drawn from the model: zero in expectation, with covariance F/N."""
    return _drawn_gradient(passes, params, inputs)[0]


def _drawn_gradient(passes: IsolatedPasses, params: Sequence[Tensor], inputs: Inputs) -> tuple[list[Tensor], int]:
    def gradient() -> tuple[list[Tensor], int]:
        loss, count = passes.drawn_loss(inputs)
        return gradients(loss, params), count

    return passes.run(inputs, passes.seed(), gradient)


def rank1(passes: IsolatedPasses, params: Sequence[Tensor], vs: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
    """N (gᵀv) g with g the gradient on drawn labels, a mean over N terms: F v in expectation."""
    grads, count = _drawn_gradient(passes, params, inputs)
    grads = [g.to(v.dtype) for g, v in zip(grads, vs, strict=True)]
    dot = torch.stack([torch.sum(g * v) for g, v in zip(grads, vs, strict=True)]).sum()
    return [count * dot.to(g) * g for g in grads]


FISHER: dict[str, Product] = {"ggn": ggn, "hessian": hessian, "antithetic": antithetic, "rank1": rank1}
