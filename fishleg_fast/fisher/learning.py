"""How λ follows the Fisher matrix: learned on the auxiliary loss, and anchored to the Kronecker factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.costs import count_applications
from ..algebra.low_rank import LowRank
from ..algebra.maths import Applications, Aux
from ..algebra.matrix import Matrix, dense, dot, widest
from ..algebra.natural import rate_of
from ..algebra.stacks import scalars
from ..algebra.structures import stacked
from ..backends.protocol import LambdaOptions, Ops
from ..distributed.ranks import Ranks
from ..model.block import Block, weights_of
from ..model.stack import Stack, assembled_matrices, scaled, stacks_of
from ..passes.inputs import Inputs
from ..passes.isolated import IsolatedPasses
from ..passes.taps.statistics import StatisticsTap
from .layer_check import check_layers, load_verdicts, verdicts
from .layer_pass import Share
from .low_rank_products import low_rank_ggn
from .moments import moments
from .products import FISHER, drawn_gradient


@dataclass(frozen=True)
class CurvatureOptions:
    """How λ follows the Fisher matrix, with the names and meanings of ``FishLeg``'s arguments; ``update`` is Adam's."""

    update: LambdaOptions
    update_aux_every: int
    fisher: str
    u_sampling: str
    init: str
    anchor_every: int
    anchor_decay: float
    curvature_batch: int | str | None
    anchor_from: str
    aux_update: str = "adam"
    relative_damping: bool = False  # γ is in units of F's own eigenvalues, and of the noise in a gradient

    @property
    def natural(self) -> bool:
        """Whether λ is learned by natural-gradient steps."""
        return self.aux_update == "natural"

    @property
    def estimate_every(self) -> int:
        """Steps between estimates of the Fisher matrix's Kronecker factors."""
        return self.update_aux_every if self.natural else self.anchor_every

    @property
    def decay(self) -> float:
        """What an estimate leaves of the average of those before it; in natural-gradient steps λ is the average."""
        return 0.0 if self.natural else self.anchor_decay


@dataclass(frozen=True)
class Quality:
    """How well Q inverts F+γI along one u of unit norm, on one curvature batch; F and γ in each block's unit."""

    aux_loss: float  # 𝒜
    best_aux_loss: float  # of the best multiple of Q u
    best_multiple: float
    residuals: dict[str, float]  # ‖(F+γI)Qu − u‖/‖u‖ of each block, by name; 0 where u is


def trained(blocks: Sequence[Block]) -> dict[int, nn.Parameter]:
    """The trainable parameters of the blocks, by id."""
    return {id(part.param): part.param for b in blocks for part in b.parts if part.param.requires_grad}


def _matrices(blocks: Sequence[Block], tensors: Mapping[int, Tensor]) -> list[Tensor]:
    """Tensors of the parameters' shapes, by id -> (m, n) of each block; zeros where there is none."""
    given = [
        [part.of(t) if (t := tensors.get(id(part.param))) is not None else None for part in b.parts] for b in blocks
    ]
    return assembled_matrices(blocks, given)


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
    """(m, n) in λ's dtype; of a low-rank v in the block's scratch memory."""
    if not isinstance(v, LowRank):
        return dense(v)
    v.into(block.scratch())
    return block.scratch()


def _of_gradient(block: Block) -> Aux:
    """Moments from the block's gradient alone; none where it has none in this step."""
    if all(g is None for g in block.grads):
        return {}
    return block.structure.gradient_moments([block.matrix(block.grads)])


def set_units(blocks: Sequence[Block], moved: Sequence[Block], mean: Tensor | None = None) -> None:
    """The unit of those that moved: the geometric mean of two mean eigenvalues of F, the block's own and that over all
    parameters of the blocks, which is ``mean`` where that is given. Where the block's is zero, or never estimated, the
    latter.
    """
    told = [b for b in blocks if b.moments]
    weights = weights_of(told)
    known = [(b, weight) for b, weight in zip(told, weights, strict=True) if weight]
    if not known:
        return
    chosen = {id(b) for b in moved}
    stacks = stacks_of([b for b, _ in known], more=[weight for _, weight in known])
    device = known[0][0].momentum.device
    means = [_mean_eigenvalues(stack, known[stack.numbers[0]][1]).to(device, widest(device)) for stack in stacks]
    if mean is None:
        totals = [own.sum() * stack.blocks[0].momentum.numel() for stack, own in zip(stacks, means, strict=True)]
        mean = torch.stack(totals).sum() / sum(b.momentum.numel() for b, _ in known)
    targets, units = [], []
    for stack, own in zip(stacks, means, strict=True):
        found = (torch.where(own > 0, own, mean) * mean).sqrt()
        for block, unit in zip(
            stack.blocks, torch.where(found > 0, found, 1).to(stack.blocks[0].unit).unbind(), strict=True
        ):
            if id(block) in chosen:
                targets.append(block.unit)
                units.append(unit)
    for block in blocks:
        if not block.moments:  # a structure or layer of the user's own
            targets.append(block.unit)
            units.append(torch.where(mean > 0, mean, 1).to(block.unit))
    if targets:
        torch._foreach_copy_(targets, units)


def _mean_eigenvalues(stack: Stack, weight: float) -> Tensor:
    return stacked.mean_eigenvalues(stack.structures, [b.moments for b in stack.blocks], weight)


class CurvatureLearner:
    """Learns and anchors the λ of blocks, by the ops of a backend and passes through the user's model."""

    def __init__(self, passes: IsolatedPasses, options: CurvatureOptions, ops: Ops, ranks: Ranks) -> None:
        self.passes, self.options, self.ops, self.ranks = passes, options, ops, ranks
        self.terms = 1.0  # over which the loss of a batch is the mean
        self.owed_updates, self.owed_anchor = 0, False  # that were due where there was nothing to learn from

    def _curvature_batch(self) -> Inputs:
        return self.ranks.each(lambda: self.passes.inputs(self.options.curvature_batch))

    def _whole_batch(self) -> Inputs:
        return self.ranks.each(self.passes.inputs)

    def updates_due(self, step: int) -> int:
        """How many of Adam's updates of λ come before this step."""
        every = self.options.update_aux_every
        if self.options.natural or not every:  # whatever a checkpoint says was owed
            return 0
        return max(self.owed_updates, -every if every < 0 else int(every > 0 and step % every == 0))

    def anchor_due(self, blocks: Sequence[Block], step: int) -> list[Block]:
        """The blocks whose Q starts, or is estimated anew, before this step."""
        told = [b for b in blocks if b.moments and any(p.requires_grad for p in b.params)]
        if self._anchor_scheduled(step):
            return told
        if self.options.init != "kfac" and not self.options.natural:
            return []
        return [b for b, weight in zip(told, weights_of(told), strict=True) if not weight]

    def _anchor_scheduled(self, step: int) -> bool:
        every = self.options.estimate_every
        return self.owed_anchor or (every > 0 and step > 0 and step % every == 0)

    def postpone(self, step: int) -> None:
        """What was due before this step stays due."""
        self.owed_updates, self.owed_anchor = self.updates_due(step), self._anchor_scheduled(step)

    def settle(self) -> None:
        """What was due has been done."""
        self.owed_updates, self.owed_anchor = 0, False

    def state(self, blocks: Sequence[Block]) -> dict[str, Any]:
        """What a checkpoint holds beside the blocks' own."""
        owed = {"owed_updates": self.owed_updates, "owed_anchor": self.owed_anchor}
        return {"terms": self.terms, **owed, "layers": verdicts(blocks)}

    def load(self, saved: Mapping[str, Any], blocks: Sequence[Block]) -> None:
        """Take up what ``state`` gave, or what was saved before anything was owed."""
        self.terms = saved["terms"]
        self.owed_updates, self.owed_anchor = saved.get("owed_updates", 0), saved.get("owed_anchor", False)
        load_verdicts(blocks, saved.get("layers", "{}"))

    def anchor(self, blocks: Sequence[Block], due: Sequence[Block], tap: StatisticsTap | None = None) -> None:
        """Q of the blocks that are due from the moving average of the Fisher's Kronecker factors, to which this batch's
        are added; or a natural-gradient step of λ by this batch's.

        Factors that are not finite are left out: Q stays what it is. ``tap``: what saw them in the user's own backward
        pass, whose gradients the blocks have; None: passes with labels drawn from the model.
        """
        averaged: set[int] = set()

        def take(share: Share) -> None:
            done = self.ops.average_moments(share.blocks, share.statistics, self.options.decay, share.more)
            averaged.update(map(id, done))

        inputs, weights = self._whole_batch(), self._weights(due)
        if tap is None:
            terms = self.ranks.each(lambda: moments(self.passes, due, inputs, take))
        else:
            self.ranks.each(lambda: check_layers(self.passes, due, inputs))
            found, terms = tap.take(due)
            shown = [m if b.layer_agrees else None for b, m in zip(due, found, strict=True)]
            take(Share(due, [_of_gradient(b) if m is None else m for b, m in zip(due, shown, strict=True)]))
        moved = self._averaged_over_ranks(due, averaged)
        (terms,) = self.ranks.sums([terms])
        self.terms = terms or self.terms
        self._follow(blocks, moved, weights)

    def _weights(self, blocks: Sequence[Block]) -> dict[int, float]:
        """Of the averages so far, by id of the block."""
        return dict(zip(map(id, blocks), weights_of(blocks), strict=True))

    def _follow(self, blocks: Sequence[Block], moved: Sequence[Block], weights: Mapping[int, float]) -> None:
        """λ of the blocks that ``moved`` from their moments, and their units. ``weights``: before they moved."""
        before = [b.unit.clone() for b in moved] if self.options.natural else []
        rate = float(self.options.update.lr)
        if self.options.natural:  # moments over their weight are the batch's
            for block in moved:
                weight = (1 - rate) * weights[id(block)] + rate
                block.moments_weight.fill_(weight)
                torch._foreach_mul_(list(block.moments.values()), weight)
        if self.options.relative_damping:
            self._set_units(blocks, moved)
        else:
            for block in moved:  # a checkpoint may have been of relative damping
                block.unit.fill_(1)
        if not self.options.natural:
            self.ops.start_kfac(moved, self.damping)
            return
        for block, old, weight in zip(moved, before, weights_of(moved), strict=True):
            if self.options.relative_damping:
                block.unit.copy_(old * (block.unit / old) ** rate_of(rate, weight))
            aux = list(block.structure.fishleg_aux.values())
            torch._foreach_mul_(aux, (block.unit / old) ** (0.5 / len(aux)))  # Q, of F in the unit
        self.ops.natural_step(moved, self.damping, rate)

    def _set_units(self, blocks: Sequence[Block], moved: Sequence[Block]) -> None:
        set_units(blocks, moved)

    def _averaged_over_ranks(self, due: Sequence[Block], averaged: Collection[int]) -> list[Block]:
        """The blocks whose moments moved on some rank, on all of them."""
        if not self.ranks.several:
            return [b for b in due if id(b) in averaged]
        found = zip(due, self.ranks.sums([id(b) in averaged for b in due]), strict=True)
        counts = {id(b): n for b, n in found if n}
        moved = [b for b in due if id(b) in counts]
        decay = self.options.decay
        for block in moved:
            if id(block) not in averaged:  # where a batch's were not finite the average is what it was
                block.moments_weight.mul_(decay).add_(1 - decay)
                if self.options.natural:  # it has none of this batch
                    torch._foreach_zero_(list(block.moments.values()))
        self.ranks.mean([t for b in moved for t in b.moments.values()])
        if self.options.natural:  # where they were not finite on some ranks there are none from those
            for block in moved:
                torch._foreach_mul_(list(block.moments.values()), self.ranks.size / counts[id(block)])
        return moved

    @property
    def damping(self) -> float:
        """γ in each block's unit."""
        given = self.options.update.damping
        return given**2 / self.terms if self.options.relative_damping else given

    def applications_in_update(self, blocks: Sequence[Block], gs: Sequence[Matrix]) -> list[Applications]:
        """How often P and S of each block are used in an update of λ."""
        us = gs if self.options.u_sampling == "gradient" else [b.momentum for b in blocks]  # dense, of that shape
        return [count_applications(u, 2, int(self.options.update.precondition)) for u in us]

    def applications_in_steps(self, blocks: Sequence[Block]) -> list[Applications] | None:
        """How often P and S of each block are used in steps until λ changes; None: it does not."""
        options = self.options
        periods = [max(every, 1) for every in (options.update_aux_every, options.anchor_every) if every]
        # As if all were dense: whatever the batch, so that a resumed run decides as the first one did.
        times = min(periods, default=0)
        return [(times * n, times * m) for m, n in (b.shape for b in blocks)] if times else None

    def _scales(self, blocks: Sequence[Block]) -> Tensor | None:
        """D^½ of each block, D one over its unit: λ is of D^½FD^½, and with D^½u in the place of u, and γ in the unit,
        𝒜 is the same. None: one.
        """
        return scalars([b.unit for b in blocks]).rsqrt() if self.options.relative_damping else None

    def directions(self, blocks: Sequence[Block], gs: Sequence[Matrix]) -> list[Matrix]:
        """u of the auxiliary loss: of unit norm over all blocks together, or zero where the gradient is."""
        xs = _SAMPLING[self.options.u_sampling](self, blocks, gs)
        scales = self._scales(blocks)
        us = xs if scales is None else scaled(xs, scales)
        norm = self._over_all(self.ops.inner(us, us)).sqrt()
        inverse = 1 / torch.where(norm > 0, norm, 1)
        return scaled(xs, inverse.expand(len(xs)) if scales is None else scales * inverse.to(scales))

    def _over_all(self, total: Tensor) -> Tensor:
        """Over all blocks of the model, from what it is over those that are here."""
        return total

    def _gaussian(self, blocks: Sequence[Block], gs: Sequence[Matrix]) -> list[Matrix]:
        seed = self.ranks.common(self.passes.seed())
        generator = torch.Generator(blocks[0].momentum.device).manual_seed(seed)
        return [torch.empty_like(b.momentum).normal_(generator=generator) for b in blocks]

    def _gradient(self, blocks: Sequence[Block], gs: Sequence[Matrix]) -> list[Matrix]:
        return list(gs)

    def _momentum(self, blocks: Sequence[Block], gs: Sequence[Matrix]) -> list[Matrix]:
        return [torch.lerp(b.momentum, dense(g), 1 - b.beta) for b, g in zip(blocks, gs, strict=True)]

    def update(self, blocks: Sequence[Block], gs: Sequence[Matrix]) -> tuple[Tensor, Tensor]:
        """One Adam step of λ (eq. 14 of the talk). Returns (𝒜, whether the step was taken)."""
        us, vs, fvs = self._products(blocks, gs)
        return self.ops.lambda_step(blocks, us, vs, fvs, replace(self.options.update, damping=self.damping))

    def quality(self, blocks: Sequence[Block], gs: Sequence[Matrix]) -> Quality:
        """How well Q inverts F+γI along u, by one Fisher-vector product."""
        us, vs, fvs = self._products(blocks, gs)
        device = blocks[0].momentum.device if blocks else torch.device("cpu")
        wide = widest(device)
        rows = torch.zeros(len(blocks), 4, dtype=wide, device=device)  # vᵀ(F+γI)v, uᵀv, ‖(F+γI)v − u‖², ‖u‖²
        for k, (u, v, fv) in enumerate(zip(us, map(dense, vs), fvs, strict=True)):
            damped, u = dense(fv).to(wide) + self.damping * v.to(wide), dense(u).to(wide)
            v = v.to(wide)
            rows[k] = torch.stack([(damped * v).sum(), (u * v).sum(), (damped - u).square().sum(), u.square().sum()])
        curvature, power = self._over_all(rows[:, :2].sum(0)).tolist()
        multiple = power / curvature if curvature > 0 else math.inf if power else 0.0
        residuals = torch.where(rows[:, 3] > 0, rows[:, 2] / rows[:, 3], 0).sqrt().tolist()
        named = dict(zip((b.name for b in blocks), residuals, strict=True))
        return Quality(0.5 * curvature - power, -0.5 * multiple * power, multiple, named)

    def _products(
        self, blocks: Sequence[Block], gs: Sequence[Matrix]
    ) -> tuple[list[Matrix], list[Matrix], Sequence[Matrix]]:
        """u of the auxiliary loss, Q u, and F of that; F in each block's unit."""
        us, scales = self.directions(blocks, gs), self._scales(blocks)
        vs = self.ops.qv(blocks, us)
        if scales is None:
            fvs = self._fisher_product(blocks, vs)
        else:
            fvs = scaled(self._fisher_product(blocks, scaled(vs, scales)), scales)
        if self.options.anchor_from == "training":
            fvs = self._in_units_of_the_moments(blocks, vs, fvs)
        return us, vs, fvs

    def _in_units_of_the_moments(
        self, blocks: Sequence[Block], vs: Sequence[Matrix], fvs: Sequence[Matrix]
    ) -> list[Matrix]:
        """F v times what makes vᵀFv agree with the moments', whose scale is that of the user's loss and labels."""
        told = [k for k, b in enumerate(blocks) if b.estimated]
        expected = [dot(vs[k], blocks[k].fisher_product(vs[k])) for k in told]
        found = [dot(vs[k], fvs[k]) for k in told]
        if not told:
            return list(fvs)
        wide = widest(expected[0].device)
        ratio = torch.stack([x.to(wide) for x in expected]).sum() / torch.stack([x.to(wide) for x in found]).sum()
        ratio = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1)
        return scaled(fvs, ratio.expand(len(fvs)))

    def _fisher_product(self, blocks: Sequence[Block], vs: Sequence[Matrix]) -> list[Matrix]:
        """F v, low-rank where v is and the model's passes allow it."""
        low_rank = [k for k, v in enumerate(vs) if isinstance(v, LowRank)]
        inputs = self._curvature_batch()
        attempts = self.passes.attempts("ggn", "low rank")
        tried = bool(low_rank) and self.options.fisher == "ggn" and attempts.due(self.passes.mode())
        if tried:
            found = self._low_rank_fisher_product(blocks, vs, low_rank, inputs)
            if found is not None:
                attempts.worked()
                return found
        products = self.ranks.each(lambda: self._dense_fisher_product(blocks, vs, inputs))
        if tried:  # and no fault of the model's own
            attempts.failed()
        self.ranks.mean(products)
        return list(products)

    def _low_rank_fisher_product(
        self, blocks: Sequence[Block], vs: Sequence[Matrix], low_rank: Sequence[int], inputs: Inputs
    ) -> list[Matrix] | None:
        rest = sorted(set(range(len(blocks))).difference(low_rank))
        others = [blocks[k] for k in rest]
        params = trained(others)
        tangents = _tensors(others, [dense(vs[k]) for k in rest])
        found = low_rank_ggn(
            self.passes,
            list(params.values()),
            [tangents[i] for i in params],
            [blocks[k] for k in low_rank],
            [v for v in vs if isinstance(v, LowRank)],
            inputs,
        )
        if found is None:
            return None
        products, low_rank_products = found
        matrices = _matrices(others, dict(zip(params, products, strict=True)))
        together: dict[int, Matrix] = {
            **dict(zip(rest, matrices, strict=True)),
            **dict(zip(low_rank, low_rank_products, strict=True)),
        }
        return [together[k] for k in range(len(blocks))]

    def _dense_fisher_product(self, blocks: Sequence[Block], vs: Sequence[Matrix], inputs: Inputs) -> list[Tensor]:
        """F v, from blocks to the model's parameters and back."""
        params = trained(blocks)
        tangents = _tensors(blocks, [_expanded(b, v) for b, v in zip(blocks, vs, strict=True)])
        estimate = FISHER[self.options.fisher]
        order = list(params)
        products = estimate(self.passes, [params[i] for i in order], [tangents[i] for i in order], inputs)
        return _matrices(blocks, dict(zip(order, products, strict=True)))

    def drawn_gradients(self, blocks: Sequence[Block]) -> list[Tensor]:
        """The gradient on labels drawn from the model, (m, n) of each block."""
        params = trained(blocks)
        inputs = self._curvature_batch()
        grads = self.ranks.each(lambda: drawn_gradient(self.passes, list(params.values()), inputs))
        self.ranks.mean(grads)
        return _matrices(blocks, dict(zip(params, grads, strict=True)))


_SAMPLING: dict[str, Callable[[CurvatureLearner, Sequence[Block], Sequence[Matrix]], list[Matrix]]] = {
    "gradient": CurvatureLearner._gradient,
    "momentum": CurvatureLearner._momentum,
    "gaussian": CurvatureLearner._gaussian,
}
