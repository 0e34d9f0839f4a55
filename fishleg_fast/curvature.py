"""The Fisher matrix of a model on a curvature batch: its products with vectors, and its Kronecker factors.

F is the Fisher matrix of the mean loss, (1/N) Σ over the batch's N independent terms of Jᵀ H_out J.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from .blocks import Block
from .capture import Inputs
from .layers import layer_of
from .passes import Passes
from .reference.products import Aux
from .reference.thin import Thin
from .structure import Shown
from .thin_curvature import ThinLayers

CHUNKS, CHUNK_LEAST = 8, 16  # where a block's second moments need several gradients: how many, of how many samples

_IMPOSSIBLE = (
    "fisher='ggn' is impossible: an operation of the model has neither a forward nor a second derivative; "
    "choose fisher='antithetic' or 'rank1'"
)

Linearize = Callable[[Passes, Sequence[tuple[Tensor, Tensor]], Inputs], tuple[Tensor, "Tensor | None"]]
Product = Callable[[Passes, Sequence[Tensor], Sequence[Tensor], Inputs], list[Tensor]]


def _grad(outputs: Any, leaves: Sequence[Any], cotangents: Any = None, **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True, materialize_grads=True, **options))


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """‖·‖ of all of them together, in at least float32."""
    return torch.linalg.vector_norm(
        torch.stack(
            [torch.linalg.vector_norm(t.detach(), dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
        )
    )


def thin_ggn(
    passes: Passes,
    params: Sequence[Tensor],
    vs: Sequence[Tensor],
    blocks: Sequence[Block],
    thin_vs: Sequence[Thin],
    inputs: Inputs,
) -> tuple[list[Tensor], list[Thin]] | None:
    """``ggn`` with a thin v for the layers of ``blocks``, and dense ones for the ``params`` of others: F v of both.

    None where the model does not lend itself to it: its operations lack forward derivatives, or a layer hides. The
    generator of seeds is then as it was.
    """
    layers, before = ThinLayers(blocks, thin_vs), passes.generator.get_state()

    def linearize(
        passes: Passes, mine: Sequence[tuple[Tensor, Tensor]], inputs: Inputs
    ) -> tuple[Tensor, Tensor | None]:
        with layers:
            return _forward_mode(passes, mine, inputs)

    try:
        products, gradients = passes.run(
            inputs, passes.seed(), lambda: _ggn(passes, params, vs, inputs, linearize, layers.edges)
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # the dense product meets it again, and says what it is
        found = None
    else:
        found = layers.products(gradients)
    if found is None:
        passes.generator.set_state(before)
        return None
    return products, found


def ggn(passes: Passes, params: Sequence[Tensor], vs: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
    """Jᵀ H_out J v: the Fisher matrix itself, by one forward pass that carries the tangent and one backward pass.

    Where an operation of the model has no forward derivative J v comes from differentiating Jᵀw by w instead, as exact.
    """
    seed = passes.seed()
    if passes.forward_mode:
        try:
            return passes.run(inputs, seed, lambda: _ggn(passes, params, vs, inputs, _forward_mode)[0])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # NotImplementedError is one; a fault of the model's own comes up again below
            reason = str(error).strip().splitlines()[0]
        try:
            products = passes.run(inputs, seed, lambda: _ggn(passes, params, vs, inputs, _checked_double_backward)[0])
        except NotImplementedError as error:
            raise RuntimeError(f"{_IMPOSSIBLE} ({reason} {error})") from error
        passes.forward_mode = False
        warnings.warn(
            f"fisher='ggn' differentiates twice from here on, since forward mode failed: {reason}", stacklevel=2
        )
        return products
    return passes.run(inputs, seed, lambda: _ggn(passes, params, vs, inputs, _double_backward)[0])


def _ggn(
    passes: Passes,
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
        found = _grad(output, leaves, cotangent)
    products, rest = iter(found[: len(mine)]), found[len(mine) :]
    own = iter(likelihood.own_fisher_product(detached, [v for p, v in zip(params, vs, strict=True) if id(p) in noise]))
    return [next(own) if id(p) in noise else next(products) for p in params], rest


def _forward_mode(
    passes: Passes, mine: Sequence[tuple[Tensor, Tensor]], inputs: Inputs
) -> tuple[Tensor, Tensor | None]:
    """The outputs, with their graph, and J v; None where they do not depend on the parameters."""
    with forward_ad.dual_level():
        duals = {id(p): forward_ad.make_dual(p, v) for p, v in mine}
        return forward_ad.unpack_dual(passes.replaced(duals, lambda: passes.outputs(inputs)))


def _double_backward(
    passes: Passes, mine: Sequence[tuple[Tensor, Tensor]], inputs: Inputs, check: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The same by differentiating Jᵀw, linear in w, by w."""
    output, params = passes.outputs(inputs), [p for p, _ in mine]
    if not output.requires_grad or not params:
        return output, None
    w = torch.randn_like(output).requires_grad_()
    pulled = _grad(output, params, w, create_graph=True)
    curved = [(g, v) for g, (_, v) in zip(pulled, mine, strict=True) if g.requires_grad]
    tangent = _grad([g for g, _ in curved], [w], [v for _, v in curved], retain_graph=True)[0] if curved else None
    if check and tangent is not None:
        there = torch.sum(w.detach() * tangent).double()  # ⟨w, J v⟩
        back = torch.stack([torch.sum(g.detach() * v).double() for g, (_, v) in zip(pulled, mine, strict=True)])
        if (there - back.sum()).abs() > 1e-2 * back.abs().sum():
            raise RuntimeError(_IMPOSSIBLE)
    return output, tangent


def _checked_double_backward(
    passes: Passes, mine: Sequence[tuple[Tensor, Tensor]], inputs: Inputs
) -> tuple[Tensor, Tensor | None]:
    """... and checked by ⟨w, J v⟩ = ⟨Jᵀw, v⟩: an opaque operation drops out of a second derivative without a word."""
    return _double_backward(passes, mine, inputs, check=True)


def hessian(passes: Passes, params: Sequence[Tensor], vs: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
    """∇²ℓ v on drawn labels, by differentiating twice: F v in expectation."""

    def product() -> list[Tensor]:
        loss, _ = passes.drawn_loss(inputs)
        grads = _grad(loss, params, create_graph=True)
        curved = [(g, v.to(g.dtype)) for g, v in zip(grads, vs, strict=True) if g.requires_grad]
        if not curved:
            return [torch.zeros_like(p) for p in params]
        return _grad([g for g, _ in curved], params, [v for _, v in curved])

    return passes.run(inputs, passes.seed(), product)


def antithetic(passes: Passes, params: Sequence[Tensor], vs: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
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
        return passes.replaced(named, lambda: _grad(passes.nll(inputs, labels), moved))

    plus, minus = (passes.run(inputs, seed, partial(side, sign)) for sign in (1, -1))
    return [(a.to(v.dtype) - b) / (2 * step).to(v) for a, b, v in zip(plus, minus, vs, strict=True)]


def drawn_gradient(passes: Passes, params: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
    """∇ℓ on labels drawn from the model: zero in expectation, with covariance F/N."""
    return _drawn_gradient(passes, params, inputs)[0]


def _drawn_gradient(passes: Passes, params: Sequence[Tensor], inputs: Inputs) -> tuple[list[Tensor], int]:
    def gradient() -> tuple[list[Tensor], int]:
        loss, count = passes.drawn_loss(inputs)
        return _grad(loss, params), count

    return passes.run(inputs, passes.seed(), gradient)


def rank1(passes: Passes, params: Sequence[Tensor], vs: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
    """N (gᵀv) g with g the gradient on drawn labels, a mean over N terms: F v in expectation."""
    grads, count = _drawn_gradient(passes, params, inputs)
    grads = [g.to(v.dtype) for g, v in zip(grads, vs, strict=True)]
    dot = torch.stack([torch.sum(g * v) for g, v in zip(grads, vs, strict=True)]).sum()
    return [count * dot.to(g) * g for g in grads]


FISHER: dict[str, Product] = {"ggn": ggn, "hessian": hessian, "antithetic": antithetic, "rank1": rank1}


def moments(passes: Passes, blocks: Sequence[Block], inputs: Inputs) -> list[Shown | Aux]:
    """What tells each block's second moments on drawn labels, as its structure averages them, {} if it has none.

    Its layer's inputs and output gradients where a pass shows them, else moments from several gradients of the block.
    """
    wanted = [b for b in blocks if b.structure.moments]
    found: dict[int, Shown | Aux] = _layer_moments(passes, [b for b in wanted if b.layer is not None], inputs)
    rest = [b for b in wanted if id(b) not in found]
    if rest:
        found |= _gradient_moments(passes, rest, inputs)
    return [found.get(id(b), {}) for b in blocks]


def _layer_moments(passes: Passes, blocks: Sequence[Block], inputs: Inputs) -> dict[int, Shown | Aux]:
    shown: list[tuple[Block, Tensor, Any]] = []  # a block, its layer's input, and where its output's gradient will be

    def watch(block: Block) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and output.requires_grad:
                shown.append(
                    (block, args[0].detach(), get_gradient_edge(output))
                )  # an edge outlives in-place activations

        assert block.layer is not None
        return block.layer.register_forward_hook(hook)

    def pass_() -> tuple[int, Sequence[Tensor | None]]:
        loss, count = passes.likelihood_loss(inputs)
        for handle in hooks:  # before the backward pass, in which checkpointed modules run once more
            handle.remove()
        edges = [edge for *_, edge in shown]
        return count, torch.autograd.grad(loss, edges, allow_unused=True) if edges else ()

    hooks = [watch(block) for block in blocks]
    try:
        count, gradients = passes.run(inputs, passes.seed(), pass_)
    finally:
        for handle in hooks:
            handle.remove()
    rows: dict[int, list[tuple[Tensor, Tensor]]] = {}
    unseen: set[int] = set()
    for (block, x, _), e in zip(shown, gradients, strict=True):
        assert block.layer is not None
        found = None if e is None else layer_of(block.layer).rows(block, x, e)
        if found is None:
            unseen.add(id(block))
        else:
            rows.setdefault(id(block), []).append(found)
    together: dict[int, Shown | Aux] = {}
    for block in blocks:
        if id(block) in rows and id(block) not in unseen:
            assert block.layer is not None
            a, e = (torch.cat(side) if len(side) > 1 else side[0] for side in zip(*rows[id(block)], strict=True))
            together[id(block)] = layer_of(block.layer).shown(block, a, e, count)
    return together


def _gradient_moments(passes: Passes, blocks: Sequence[Block], inputs: Inputs) -> dict[int, Aux]:
    # All of them, as a user's own backward pass: torch's GroupNorm (2.13, channels_last)
    # crashes where its input needs no gradient.
    params = [p for p in passes.shell.parameters() if p.requires_grad and p.numel()]
    size = inputs.size()
    chunks = max(1, min(CHUNKS, size // CHUNK_LEAST))
    edges = [size * i // chunks for i in range(chunks + 1)]
    samples: list[list[Tensor]] = [[] for _ in blocks]

    def gradient(chunk: Inputs) -> tuple[list[Tensor], int]:
        loss, count = passes.likelihood_loss(chunk)
        return _grad(loss, params), count

    for start, stop in pairwise(edges):
        chunk = inputs.rows(start, stop)
        tensors, count = passes.run(chunk, passes.seed(), partial(gradient, chunk))
        grads = dict(zip(map(id, params), tensors, strict=True))
        for block, mine in zip(blocks, samples, strict=True):
            found = [(part, grads.get(id(part.param))) for part in block.parts]
            mine.append(block.matrix([None if g is None else part.of(g) for part, g in found]) * count**0.5)
    return {id(b): b.structure.gradient_moments(mine) for b, mine in zip(blocks, samples, strict=True)}
