"""How λ follows the Fisher matrix: learned on the auxiliary loss, and anchored to the Kronecker factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Block
from .capture import Inputs
from .curvature import FISHER, drawn_gradient, moments, thin_ggn
from .passes import Passes
from .reference.thin import Matrix, Thin, dense


def _params(blocks: Sequence[Block]) -> dict[int, nn.Parameter]:
    """The trainable parameters of the blocks, by id."""
    return {id(part.param): part.param for b in blocks for part in b.parts if part.param.requires_grad}


def _matrices(blocks: Sequence[Block], tensors: Mapping[int, Tensor]) -> list[Tensor]:
    """Tensors of the parameters' shapes, by id -> (m, n) of each block; zeros where there is none."""
    return [
        b.matrix([part.of(tensors[id(part.param)]) if id(part.param) in tensors else None for part in b.parts])
        for b in blocks
    ]


def _tensors(blocks: Sequence[Block], matrices: Sequence[Tensor]) -> dict[int, Tensor]:
    """(m, n) of each block -> tensors of the trainable parameters' shapes, by id."""
    tensors: dict[int, Tensor] = {}
    for block, matrix in zip(blocks, matrices, strict=True):
        for part, piece in zip(block.parts, block.split(matrix), strict=True):
            p = part.param
            if p.requires_grad and part.rows is None:
                tensors[id(p)] = piece
            elif p.requires_grad:
                whole = tensors.setdefault(id(p), torch.zeros_like(p, dtype=matrix.dtype))
                part.of(whole).copy_(piece)
    return tensors


def _expanded(block: Block, v: Matrix) -> Tensor:
    """(m, n) in λ's dtype; of a thin v in the block's scratch memory."""
    if not isinstance(v, Thin):
        return dense(v)
    v.into(block.room())
    return block.room()


class Auxiliary:
    """The auxiliary side of the optimizer. ``settings`` are FishLeg's, ``ops`` its backend's."""

    def __init__(self, passes: Passes, settings: dict[str, Any], ops: ModuleType) -> None:
        self.passes, self.settings, self.ops = passes, settings, ops

    def _curvature_batch(self) -> Inputs:
        return self.passes.inputs(self.settings["curvature_batch"])

    def anchor_due(self, block: Block, step: int) -> bool:
        """Whether Q of the block starts, or is estimated anew, before this step."""
        if not block.moments or not any(part.param.requires_grad for part in block.parts):
            return False
        every = self.settings["anchor_every"]
        start = self.settings["init"] == "kfac" and not block.moments_weight
        return start or (every > 0 and step > 0 and step % every == 0)

    def anchor(self, blocks: Sequence[Block]) -> None:
        """Q from the moving average of the Fisher's Kronecker factors, to which this batch's are added.

        Factors that are not finite are left out: Q stays what it is.
        """
        news = moments(self.passes, blocks, self.passes.inputs())
        self.ops.anchor(blocks, news, decay=self.settings["anchor_decay"], damping=self.settings["damping"])

    def directions(self, blocks: Sequence[Block], gs: Sequence[Matrix]) -> list[Matrix]:
        """u of the auxiliary loss: of unit norm over all blocks together, or zero where the gradient is."""
        us = _SAMPLING[self.settings["u_sampling"]](self, blocks, gs)
        norm = self.ops.inner(us, us).sqrt()
        norm = torch.where(norm > 0, norm, 1)
        return [u / norm.to(u) if isinstance(u, Tensor) else u.scaled(1 / norm) for u in us]

    def _gaussian(self, blocks: Sequence[Block], gs: Sequence[Matrix]) -> list[Matrix]:
        generator = torch.Generator(blocks[0].momentum.device).manual_seed(self.passes.seed())
        return [torch.empty_like(b.momentum).normal_(generator=generator) for b in blocks]

    def _gradient(self, blocks: Sequence[Block], gs: Sequence[Matrix]) -> list[Matrix]:
        return list(gs)

    def _momentum(self, blocks: Sequence[Block], gs: Sequence[Matrix]) -> list[Matrix]:
        return [torch.lerp(b.momentum, dense(g), 1 - b.beta) for b, g in zip(blocks, gs, strict=True)]

    def update(self, blocks: Sequence[Block], gs: Sequence[Matrix], capturable: bool) -> tuple[Tensor, Tensor]:
        """One Adam step of λ (eq. 14 of the talk). Returns (𝒜, whether the step was taken)."""
        s, ops = self.settings, self.ops
        us = self.directions(blocks, gs)
        vs = ops.qv(blocks, us)
        return ops.lambda_step(
            blocks,
            us,
            vs,
            self._fisher_product(blocks, vs),
            damping=s["damping"],
            lr=s["aux_lr"],
            betas=s["aux_betas"],
            eps=s["aux_eps"],
            precondition=s["precondition_aux"],
            learn_scale=s["learn_scale"],
            capturable=capturable,
        )

    def _fisher_product(self, blocks: Sequence[Block], vs: Sequence[Matrix]) -> list[Matrix]:
        """F v, thin where v is and the model's passes allow it."""
        thin = [k for k, v in enumerate(vs) if isinstance(v, Thin)]
        inputs = self._curvature_batch()
        if thin and self.settings["fisher"] == "ggn" and self.passes.forward_mode and self.passes.thin_mode:
            found = self._thin_fisher_product(blocks, vs, thin, inputs)
            if found is not None:
                return found
            self.passes.thin_mode = False
        return list(self._dense_fisher_product(blocks, vs, inputs))

    def _thin_fisher_product(
        self, blocks: Sequence[Block], vs: Sequence[Matrix], thin: Sequence[int], inputs: Inputs
    ) -> list[Matrix] | None:
        rest = sorted(set(range(len(blocks))).difference(thin))
        others = [blocks[k] for k in rest]
        params = _params(others)
        tangents = _tensors(others, [dense(vs[k]) for k in rest])
        found = thin_ggn(
            self.passes,
            list(params.values()),
            [tangents[i] for i in params],
            [blocks[k] for k in thin],
            [v for v in vs if isinstance(v, Thin)],
            inputs,
        )
        if found is None:
            return None
        products, thin_products = found
        matrices = _matrices(others, dict(zip(params, products, strict=True)))
        together: dict[int, Matrix] = {
            **dict(zip(rest, matrices, strict=True)),
            **dict(zip(thin, thin_products, strict=True)),
        }
        return [together[k] for k in range(len(blocks))]

    def _dense_fisher_product(self, blocks: Sequence[Block], vs: Sequence[Matrix], inputs: Inputs) -> list[Tensor]:
        """F v, from blocks to the model's parameters and back."""
        params = _params(blocks)
        tangents = _tensors(blocks, [_expanded(b, v) for b, v in zip(blocks, vs, strict=True)])
        estimate = FISHER[self.settings["fisher"]]
        order = list(params)
        products = estimate(self.passes, [params[i] for i in order], [tangents[i] for i in order], inputs)
        return _matrices(blocks, dict(zip(order, products, strict=True)))

    def drawn_gradients(self, blocks: Sequence[Block]) -> list[Tensor]:
        """The gradient on labels drawn from the model, (m, n) of each block."""
        params = _params(blocks)
        grads = drawn_gradient(self.passes, list(params.values()), self._curvature_batch())
        return _matrices(blocks, dict(zip(params, grads, strict=True)))


_SAMPLING: dict[str, Callable[[Auxiliary, Sequence[Block], Sequence[Matrix]], list[Matrix]]] = {
    "gradient": Auxiliary._gradient,
    "momentum": Auxiliary._momentum,
    "gaussian": Auxiliary._gaussian,
}
