"""Whether what layers show in a pass makes their parameters' gradients.

That eᵀa is the gradient holds for a plain layer, but not where a subclass scales or standardizes its weight, or another
operation of the model uses the same weight. Both are compared on a random vector, as low-rank gradients are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..model.block import Block
from ..model.layers import layer_of
from ..passes.inputs import Inputs
from ..passes.isolated import IsolatedPasses
from .layer_pass import LayerPass, Shown, parts_of

TOLERANCE = 0.01  # what factors may be wrong by is far more than rounding, also that of TF32
ROUNDING = 8  # and that of lower precision, in units of it
SAMPLES = 8  # do to see it


def check_layers(passes: IsolatedPasses, blocks: Sequence[Block], inputs: Inputs) -> None:
    """Note on each block with a layer whether what that shows is the block's gradient, where it is time to look: at the
    first anchorings in a mode of the model, ever more seldom later on, and where a block is new.
    """
    told = [b for b in blocks if b.layer is not None and b.structure.moments]
    due = passes.attempts("moments", "layers").check_due(passes.mode())
    if told and (due or any(b.layer_agrees is None for b in told)):
        check, some = LayerCheck(told), inputs.rows(0, SAMPLES)
        passes.run(some, 0, partial(check.run, passes, some))  # the optimizer's seeds are for what is made use of
        check.note()


def verdicts(blocks: Sequence[Block]) -> str:
    """What was found of the blocks, by name, as text for a checkpoint."""
    return json.dumps({b.name: b.layer_agrees for b in blocks if b.layer_agrees is not None})


def load_verdicts(blocks: Sequence[Block], text: str) -> None:
    """Take up what ``verdicts`` gave: a resumed run looks again when the first one does."""
    found = json.loads(text)
    for block in blocks:
        block.layer_agrees = found.get(block.name)


class LayerCheck(LayerPass):
    """A pass that takes of each layer the product of what it shows with a random vector."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__(blocks, lambda share: None, of_unseen=False)
        self._products: dict[int, tuple[Tensor, Tensor, Tensor, float]] = {}  # by id of the block

    def _wanted(self, passes: IsolatedPasses) -> Iterable[Tensor]:
        return [p for p in passes.root.parameters() if p.numel()]  # all of them, as a user's own backward pass

    def _use(self, block: Block, calls: Sequence[Shown]) -> bool:
        assert block.layer is not None
        layer, r = layer_of(block.layer), probe(block)
        total, square, eps = r.new_zeros(block.shape[0]), r.new_zeros(()), 0.0
        for call in calls:
            for x, e in parts_of(block, *call):
                rows = layer.rows(block, x, e)
                if rows is None:
                    return False
                product, rounding = layer.product(block, *rows, r)
                total += product
                square += rounding
                floating = [t.dtype for t in (x, e, block.params[0]) if t.is_floating_point()]
                eps = max(eps, *(torch.finfo(dtype).eps for dtype in floating))
        self._products[id(block)] = r, total, square, eps
        return True

    @torch.no_grad()
    def note(self) -> None:
        """Set ``layer_agrees`` of all blocks. Those of which nothing was seen, or numbers that are not finite, keep
        the benefit of the doubt.
        """
        for block, wrong in zip(self._blocks, self.wrong(), strict=True):
            block.layer_agrees = not wrong

    @torch.no_grad()
    def wrong(self) -> list[bool]:
        """Whether what its layer shows is not its gradient, of each block."""
        seen = [b for b in self._blocks if id(b) in self._products]
        excess = [self._excess(b, *self._products[id(b)]).cpu().double() for b in seen]
        found = dict(zip(map(id, seen), (torch.stack(excess) > 0).tolist() if excess else (), strict=True))
        return [found.get(id(b), False) for b in self._blocks]

    def _excess(self, block: Block, r: Tensor, product: Tensor, square: Tensor, eps: float) -> Tensor:
        """By how much the two products differ more than rounding lets them: positive where one is wrong."""
        grads = [self.gradients.get(id(part.param)) for part in block.parts]
        parts = [None if g is None else part.of(g) for part, g in zip(block.parts, grads, strict=True)]
        return self._excess_over(block.matrix(parts) @ r, block, product, square, eps)

    def _excess_over(self, true: Tensor, block: Block, product: Tensor, square: Tensor, eps: float) -> Tensor:
        """The same; ``true``: the gradient's product."""
        if not all(p.requires_grad for p in block.params) and block.axis == 0:
            product = product * _trained(block)[:, 0]
        size = torch.linalg.vector_norm(true) + square.sqrt()  # of sums that add up, and of random signs
        return torch.linalg.vector_norm(product - true) - max(TOLERANCE, ROUNDING * eps) * size


def probe(block: Block) -> Tensor:
    """A random vector (n,), zero for columns of frozen parameters."""
    r = torch.randn(block.shape[1], generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    r = r.to(block.params[0].device, block.dtype)
    frozen = block.axis == 1 and not all(p.requires_grad for p in block.params)
    return r * _trained(block)[0] if frozen else r


def _trained(block: Block) -> Tensor:
    """(m, n): one where the parameter is trained, else zero."""
    ones = [torch.ones(part.shape, device=part.param.device) for part in block.parts]
    return block.matrix(
        [one if part.param.requires_grad else None for one, part in zip(ones, block.parts, strict=True)]
    )
