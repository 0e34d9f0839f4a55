"""Products of the Fisher matrix of a model on a curvature batch with vectors.

F is the Fisher matrix of the mean loss, (1/N) Σ over the batch's N independent terms of Jᵀ H_out J.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from ..algebra.matrix import widest
from ..model.layers import constant_row
from ..passes.inputs import Inputs
from ..passes.isolated import IsolatedPasses
from ..precision import precision_scope

Result = TypeVar("Result")
Found = tuple[list[Tensor], list[Tensor]]
# (passes, parameters and their v, inputs, then) -> then(the outputs with their graph, J v or None if it is zero)
Linearize = Callable[
    [IsolatedPasses, Sequence[tuple[Tensor, Tensor]], Inputs, Callable[[Tensor, "Tensor | None"], Found]], Found
]
TangentCheck = Callable[[Tensor, "Tensor | None", Sequence[tuple[Tensor, Tensor]], Sequence[Tensor], Any], None]
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


def ggn(
    passes: IsolatedPasses, params: Sequence[Tensor], vs: Sequence[Tensor], inputs: Inputs, seed: int | None = None
) -> list[Tensor]:
    """Jᵀ H_out J v: the Fisher matrix itself, by one forward pass that carries the tangent and one backward pass.

    Where that fails J v comes from differentiating Jᵀw by w instead, as exact; and where the model has no second
    derivatives either, from differences of its outputs, up to O(ε²).
    """
    seed, mode = passes.seed() if seed is None else seed, passes.mode()

    def exactly(way: str, linearize: Linearize) -> Callable[[], list[Tensor]]:
        def product() -> list[Tensor]:
            check = check_tangent if passes.attempts("ggn", way).check_due(mode) else None
            return again_if_checkpointed(
                passes,
                lambda: passes.run(
                    inputs,
                    seed,
                    lambda: linearized_ggn(passes, params, vs, inputs, linearize, check=check)[0],
                    twice=True,
                ),
            )

        return product

    return _first_that_works(
        passes,
        "ggn",
        {
            "forward mode": exactly("forward mode", forward_mode_product),
            "differentiates twice": exactly("differentiates twice", _double_backward),
            "takes differences of the model's outputs": lambda: _by_differences(passes, params, vs, inputs, seed),
        },
    )


def _first_that_works(
    passes: IsolatedPasses, fisher: str, ways: Mapping[str, Callable[[], list[Tensor]]]
) -> list[Tensor]:
    """The product by the first of the ways that does not fail, which is told of once where it is not the first.

    A way has failed where another one works: the model's own faults are raised by the last, and nobody's.
    """
    *before, last = ways
    mode = passes.mode()
    failed: dict[str, str] = {}
    for name in before:
        attempts = passes.attempts(fisher, name)
        if not attempts.due(mode):
            continue
        try:
            product = ways[name]()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # NotImplementedError is one
            if isinstance(error, WrongDerivative):
                attempts.rule_out()
            failed[name] = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        else:
            attempts.worked()
            break
    else:
        name, product = last, ways[last]()
    for other in failed:
        passes.attempts(fisher, other).failed()
    if failed:
        exact = ". Nothing need be done: the product is the same, and takes longer" if "twice" in name else ""
        passes.tell_once(
            f"{fisher} {name}",
            f"fisher={fisher!r} {name} from here on, since {_joined(failed)}{exact}",
        )
    return product


def _joined(failed: Mapping[str, str]) -> str:
    first, *rest = [
        f"{'a second derivative' if 'twice' in name else name} failed: {why}" for name, why in failed.items()
    ]
    return "; and ".join([first, *rest])


@precision_scope("highest")  # whose small differences TF32 would drown
def _by_differences(
    passes: IsolatedPasses, params: Sequence[Tensor], vs: Sequence[Tensor], inputs: Inputs, seed: int
) -> list[Tensor]:
    """Jᵀ H_out times (f(θ+εv̂) − f(θ−εv̂)) ‖v‖/2ε: of first derivatives alone."""
    mine = of_model(passes, params, vs)
    if not mine:
        return passes.run(inputs, seed, lambda: linearized_ggn(passes, params, vs, inputs, _no_tangent)[0])
    step = _step([p for p, _ in mine], [v for _, v in mine])

    def side(sign: int) -> Tensor:
        moved = {id(p): _moved(p, v, sign * step) for p, v in mine}  # with a graph, as the user's passes
        return passes.replaced(moved, lambda: passes.outputs(inputs).detach())

    plus, minus = (passes.run(inputs, seed, partial(side, sign)) for sign in (1, -1))
    tangent = (plus - minus) / (2 * step).to(plus)

    def linearize(
        passes: IsolatedPasses,
        mine: Sequence[tuple[Tensor, Tensor]],
        inputs: Inputs,
        then: Callable[[Tensor, Tensor | None], Found],
    ) -> Found:
        return then(passes.outputs(inputs), tangent)

    return passes.run(inputs, seed, lambda: linearized_ggn(passes, params, vs, inputs, linearize)[0])


def _no_tangent(
    passes: IsolatedPasses,
    mine: Sequence[tuple[Tensor, Tensor]],
    inputs: Inputs,
    then: Callable[[Tensor, Tensor | None], Found],
) -> Found:
    return then(passes.outputs(inputs), None)


def of_model(passes: IsolatedPasses, params: Sequence[Tensor], vs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Without the likelihood's own parameters; v in the parameter's dtype."""
    assert passes.likelihood is not None
    noise = {id(p) for p in passes.likelihood.parameters()}
    return [(p, v.to(p.dtype)) for p, v in zip(params, vs, strict=True) if id(p) not in noise]


class WrongDerivative(RuntimeError):
    """An operation hides from it."""


def check_tangent(
    w: Tensor,
    tangent: Tensor | None,
    mine: Sequence[tuple[Tensor, Tensor]],
    pulled: Sequence[Tensor],
    autocast: torch.dtype | None = None,
    others: Sequence[Tensor] = (),
) -> None:
    """⟨w, J v⟩ = ⟨Jᵀw, v⟩, ``others`` being what the right side has beside ``mine``. WrongDerivative where they differ.

    What an operation hides from one derivative, and not from the other, shows: tangents pass by ``torch.no_grad()``,
    and are lost in scripted functions; opaque operations drop out of second derivatives.
    """
    wide = widest(w.device)
    there = 0.0 if tangent is None else float(torch.sum(w.to(wide) * tangent.to(wide)))
    terms = [torch.sum(g.detach() * v).to(wide) for g, (_, v) in zip(pulled, mine, strict=True)]
    back = torch.stack([*terms, *(term.to(wide) for term in others)])
    rounding = _rounding([w, *(v for _, v in mine)], autocast)
    if abs(there - float(back.sum())) > rounding * max(float(back.abs().sum()), abs(there)):
        raise WrongDerivative(
            "J v is not what backward passes say (does forward use torch.no_grad() or a scripted part?)"
        )


def _rounding(tensors: Sequence[Tensor], autocast: torch.dtype | None) -> float:
    """What two products may differ by, relative to their size."""
    least = 1e-3 if tensors[0].device.type == "cpu" else 1e-2  # on a GPU convolutions may be in TF32
    dtypes = {t.dtype for t in tensors} | ({autocast} if autocast is not None else set())
    return max(least, *(8 * torch.finfo(dtype).eps for dtype in dtypes))


def linearized_ggn(
    passes: IsolatedPasses,
    params: Sequence[Tensor],
    vs: Sequence[Tensor],
    inputs: Inputs,
    linearize: Linearize,
    edges: Callable[[], list[Any]] = list,
    check: TangentCheck | None = None,
) -> Found:
    """F v of the parameters, and Jᵀ H_out J v at the edges."""
    mine = of_model(passes, params, vs)
    return linearize(passes, mine, inputs, partial(_pulled_back, passes, params, vs, inputs, mine, edges, check))


def _pulled_back(
    passes: IsolatedPasses,
    params: Sequence[Tensor],
    vs: Sequence[Tensor],
    inputs: Inputs,
    mine: Sequence[tuple[Tensor, Tensor]],
    edges: Callable[[], list[Any]],
    check: TangentCheck | None,
    output: Tensor,
    tangent: Tensor | None,
) -> Found:
    """``linearized_ggn`` from the outputs and J v on."""
    likelihood = passes.likelihood
    assert likelihood is not None
    noise = {id(p) for p in likelihood.parameters()}
    detached = output.detach()
    leaves: list[Any] = [p for p, _ in mine]
    found = [torch.zeros_like(p) for p in leaves]
    leaves += edges()
    cotangent = None
    if tangent is not None and leaves:
        tangent = tangent.detach().to(output.dtype)
        cotangent = passes.scoring(inputs).fisher_product(detached, tangent)
        found = gradients(output, leaves, cotangent, retain_graph=check is not None)
    if check is not None and leaves and output.requires_grad:
        w, pulled = cotangent, found
        if w is None or not w.any():  # then nothing has been checked
            w = torch.randn_like(detached)
            pulled = gradients(output, leaves, w)
        check(w, tangent, mine, pulled, inputs.autocast)
    products, rest = iter(found[: len(mine)]), found[len(mine) :]
    own = iter(likelihood.own_fisher_product(detached, [v for p, v in zip(params, vs, strict=True) if id(p) in noise]))
    return [next(own) if id(p) in noise else next(products) for p in params], rest


def forward_mode_product(
    passes: IsolatedPasses,
    mine: Sequence[tuple[Tensor, Tensor]],
    inputs: Inputs,
    then: Callable[[Tensor, Tensor | None], Result],
    at: Sequence[Tensor] | None = None,
) -> Result:
    """By tangents that the forward pass carries. Where checkpointed modules run once more during the backward pass that
    follows, these have to carry them too, and all of that pass does; elsewhere it goes without, at half the cost.

    ``at``: other values of the parameters.
    """

    def outputs() -> tuple[Tensor, Tensor | None]:
        return forward_ad.unpack_dual(passes.outputs(inputs))

    with forward_ad.dual_level():
        values = [p for p, _ in mine] if at is None else at
        duals = {id(p): forward_ad.make_dual(value, v) for value, (p, v) in zip(values, mine, strict=True)}
        places = _without_padding(passes, mine, values)
        if passes.checkpointed:
            return passes.replaced(duals, lambda: then(*outputs()), places)
        found = passes.replaced(duals, outputs, places)
    return then(*found)


def _without_padding(
    passes: IsolatedPasses, mine: Sequence[tuple[Tensor, Tensor]], values: Sequence[Tensor]
) -> dict[tuple[int, str], Tensor]:
    """Duals for embeddings of padding, which their backward pass takes as a constant and a tangent would not."""
    known, found = {id(p): (value, v) for value, (p, v) in zip(values, mine, strict=True)}, {}
    for module in passes.root.modules():
        row = constant_row(module, "weight")
        if row is not None and (p := module._parameters.get("weight")) is not None and id(p) in known:
            value, v = known[id(p)]
            v = v.clone()
            v[row] = 0
            found[id(module), "weight"] = forward_ad.make_dual(value, v)
    return found


def again_if_checkpointed(passes: IsolatedPasses, product: Callable[[], Result]) -> Result:
    """``product()``, by ``forward_mode_product``: once more where modules turn out to be checkpointed."""
    try:
        return product()
    except CheckpointError:
        if passes.checkpointed:
            raise
    passes.checkpointed = True
    return product()


def _double_backward(
    passes: IsolatedPasses,
    mine: Sequence[tuple[Tensor, Tensor]],
    inputs: Inputs,
    then: Callable[[Tensor, Tensor | None], Found],
) -> Found:
    """By differentiating Jᵀw, linear in w, by w."""
    output, params = passes.outputs(inputs), [p for p, _ in mine]
    if not output.requires_grad or not params:
        return then(output, None)
    w = torch.randn_like(output).requires_grad_()
    pulled = gradients(output, params, w, create_graph=True)
    curved = [(g, v) for g, (_, v) in zip(pulled, mine, strict=True) if g.requires_grad]
    tangent = gradients([g for g, _ in curved], [w], [v for _, v in curved], retain_graph=True)[0] if curved else None
    return then(output, tangent)


def hessian(passes: IsolatedPasses, params: Sequence[Tensor], vs: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
    """∇²ℓ v on drawn labels, by differentiating twice: F v in expectation. ``antithetic`` where that fails, and where
    ∇²ℓ is not symmetric: an opaque operation drops out of second derivatives without a word.
    """
    seed, mode = passes.seed(), passes.mode()

    def product() -> list[Tensor]:
        loss, _ = passes.drawn_loss(inputs)
        grads = gradients(loss, params, create_graph=True)
        curved = [(g, v.to(g.dtype)) for g, v in zip(grads, vs, strict=True) if g.requires_grad]
        if not curved:
            return [torch.zeros_like(p) for p in params]
        due = passes.attempts("hessian", "differentiates twice").check_due(mode)
        found = gradients([g for g, _ in curved], params, [v for _, v in curved], retain_graph=due)
        if due:
            images = [(g, x.detach()) for g, x in zip(grads, found, strict=True) if g.requires_grad]
            again = gradients([g for g, _ in images], params, [x for _, x in images])
            there = sum(float(x.to(widest(x.device)).square().sum()) for x in found)  # ⟨Hv, Hv⟩ = ⟨v, H Hv⟩
            back = sum(float(torch.sum(x * v)) for x, v in zip(again, vs, strict=True))
            if abs(there - back) > _rounding(found, inputs.autocast) * max(there, abs(back)):
                raise WrongDerivative("second derivatives are not symmetric: an operation hides from them")
        return found

    return _first_that_works(
        passes,
        "hessian",
        {
            "differentiates twice": lambda: passes.run(inputs, seed, product, twice=True),
            "is 'antithetic'": lambda: _antithetic(passes, params, vs, inputs, seed),
        },
    )


def antithetic(passes: IsolatedPasses, params: Sequence[Tensor], vs: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
    """‖v‖ (∇ℓ(θ+εv̂) − ∇ℓ(θ−εv̂))/2ε on one set of drawn labels: F v in expectation, up to O(ε²).

    θ itself is never written to.
    """
    return _antithetic(passes, params, vs, inputs, passes.seed())


@precision_scope("highest")
def _antithetic(
    passes: IsolatedPasses, params: Sequence[Tensor], vs: Sequence[Tensor], inputs: Inputs, seed: int
) -> list[Tensor]:
    step = _step(params, vs)
    labels = passes.run(inputs, seed, lambda: passes.draw(inputs))

    def side(sign: int) -> list[Tensor]:
        moved = [_moved(p, v, sign * step) for p, v in zip(params, vs, strict=True)]
        named = {id(p): q for p, q in zip(params, moved, strict=True)}
        return passes.replaced(named, lambda: gradients(passes.nll(inputs, labels), moved))

    plus, minus = (passes.run(inputs, seed, partial(side, sign)) for sign in (1, -1))
    return [(a.to(v.dtype) - b) / (2 * step).to(v) for a, b, v in zip(plus, minus, vs, strict=True)]


def _step(params: Sequence[Tensor], vs: Sequence[Tensor]) -> Tensor:
    """ε/‖v‖, with ε = ‖θ‖ ∛eps, eps that of the parameters' dtype: the balance of rounding and truncation."""
    norm, size = _norm(vs), _norm(params)
    unit = max(torch.finfo(p.dtype).eps for p in params) ** (1 / 3)
    return unit * torch.where(size > 0, size, 1) / torch.where(norm > 0, norm, 1)


def _moved(p: Tensor, v: Tensor, by: Tensor) -> Tensor:
    return (p.detach() + by.to(v) * v).to(p.dtype).requires_grad_()


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
