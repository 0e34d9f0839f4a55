"""How λ follows the Fisher matrix where each block's is on one rank, and the model's parameters are on all of them.

Every rank runs the optimizer's passes on its own part of a batch. What they tell of a block is added up on the rank
that owns it; what the passes need of a block comes from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ..algebra.maths import Aux
from ..algebra.matrix import Matrix, dense, dot, widest
from ..algebra.structures.base import LayerStatistics
from ..backends.protocol import Ops
from ..distributed.ranks import Ranks
from ..fisher.layer_check import SAMPLES, LayerCheck, probe
from ..fisher.layer_pass import LayerPass, Share
from ..fisher.learning import CurvatureLearner, CurvatureOptions, set_units
from ..fisher.moments import chunks_of
from ..fisher.products import WrongDerivative
from ..fisher.step_limit import Line, quadratic_model
from ..model.block import Block
from ..model.stack import scaled
from ..passes.inputs import Inputs
from ..passes.isolated import IsolatedPasses
from ..passes.taps.statistics import StatisticsTap
from ..precision import precision_scope
from .exchange import Directions, Slot
from .model import ShardedModel
from .reduction import Expected, Reduction, add_up

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}  # of ⟨w, J v⟩ = ⟨Jᵀw, v⟩; else 0.1


class ShardedLearner(CurvatureLearner):
    """``blocks`` of its methods are those that this rank owns."""

    def __init__(
        self, passes: IsolatedPasses, options: CurvatureOptions, ops: Ops, ranks: Ranks, model: ShardedModel
    ) -> None:
        super().__init__(passes, options, ops, ranks)
        self._model, self._started = model, False

    def anchor_due(self, blocks: Sequence[Block], step: int) -> list[Block]:
        """All blocks of the model, where it is time: on every rank alike."""
        first = (self.options.init == "kfac" or self.options.natural) and not self._started
        if not (first or self._anchor_scheduled(step)):
            return []
        return [b for b in self._model.layouts if b.structure.moments and any(p.requires_grad for p in b.params)]

    def state(self, blocks: Sequence[Block]) -> dict[str, Any]:
        """As the base's: the same on all ranks."""
        return super().state(self._model.layouts)

    def load(self, saved: Mapping[str, Any], blocks: Sequence[Block]) -> None:
        """As the base's."""
        super().load(saved, self._model.layouts)
        self._started = saved.get("aux_steps" if self.options.natural else "anchors", 0) > 0

    def anchor(self, blocks: Sequence[Block], due: Sequence[Block], tap: StatisticsTap | None = None) -> None:
        """As the base's; ``due``: blocks of the model."""
        inputs, moved = self._whole_batch(), list[Block]()

        def take(number: int, found: Aux) -> None:
            mine = [self._model.mine[number]]
            moved.extend(self.ops.average_moments(mine, [found], self.options.decay))

        weights = self._weights(blocks)
        shared = _SharedMoments(self._model, due, take)
        terms = self.ranks.each(lambda: self._moments(due, inputs, shared))
        shared.finish()
        (terms,) = self.ranks.sums([terms])
        self.terms = terms or self.terms
        self._started = True
        self._follow(blocks, moved, weights)

    def _set_units(self, blocks: Sequence[Block], moved: Sequence[Block]) -> None:
        device = self._model.device
        here = torch.zeros(2, dtype=widest(device), device=device)
        for b in blocks:
            if b.estimated:
                entries = b.momentum.numel()
                here += torch.stack([b.mean_eigenvalue().to(here) * entries, here.new_tensor(float(entries))])
        trace, entries = self._over_all(here)
        if bool(entries > 0):
            set_units(blocks, moved, trace / entries)

    def directions(self, blocks: Sequence[Block], gs: Sequence[Matrix]) -> list[Matrix]:
        """As the base's, of unit norm over the blocks of all ranks, of which some may have none."""
        if not blocks:
            self._over_all(torch.zeros((), device=self._model.device))
            return []
        return super().directions(blocks, gs)

    def _over_all(self, total: Tensor) -> Tensor:
        return self._model.total(total)

    def _moments(self, due: Sequence[Block], inputs: Inputs, shared: _SharedMoments) -> float:
        """What tells the blocks' second moments, on drawn labels; how many terms the loss is the mean of."""
        self._check_layers(due, inputs)
        shown = [b for b in due if b.layer is not None and b.layer_agrees]
        layers = _ShardedLayerPass(self._model, shown, shared.add)
        terms = self.passes.run(inputs, self.passes.seed(), partial(layers.run, self.passes, inputs))
        seen = set(map(id, shown)).difference(map(id, [*layers.unseen, *layers.hidden]))
        rest = [b for b in due if id(b) not in seen]
        if self.ranks.least(-len(rest)):  # which takes passes that all ranks run together
            shared.add(Share(rest, self._gradient_moments(rest, inputs)))
        return terms

    def _check_layers(self, due: Sequence[Block], inputs: Inputs) -> None:
        """As ``fisher.layer_check.check_layers``: what a layer shows is made use of if it is right on all ranks."""
        told = [b for b in due if b.layer is not None]
        look = self.passes.attempts("moments", "layers").check_due(self.passes.mode())
        if told and (look or any(b.layer_agrees is None for b in told)):
            check, some = _ShardedLayerCheck(self._model, told), inputs.rows(0, SAMPLES)
            self.passes.run(some, 0, partial(check.run, self.passes, some))
            for block, wrong in zip(told, self.ranks.sums(check.wrong()), strict=True):
                block.layer_agrees = not wrong

    def _gradient_moments(self, blocks: Sequence[Block], inputs: Inputs) -> list[Aux]:
        """From gradients on drawn labels, of parts of this rank's batch."""
        numbers, samples = [self._model.number(b) for b in blocks], [list[Tensor]() for _ in blocks]
        for start, stop in pairwise(chunks_of(inputs, self.ranks.least)):  # whose passes all ranks run together
            chunk = inputs.rows(start, stop)
            grads: dict[Slot, Tensor] = {}
            drawn = partial(self._drawn, chunk, set(numbers), partial(add_up, grads))
            terms = self.passes.run(chunk, self.passes.seed(), drawn)
            for block, number, mine in zip(blocks, numbers, samples, strict=True):
                found = [grads.get((number, k)) for k in range(len(block.parts))]
                mine.append(block.matrix(found) * terms**0.5)
        return [b.structure.gradient_moments(mine) for b, mine in zip(blocks, samples, strict=True)]

    def _drawn(self, inputs: Inputs, numbers: set[int], take: Any) -> float:
        """A backward pass on drawn labels, in ``passes.run``; over how many terms its loss is the mean."""
        leaf = torch.zeros((), device=self._model.device, requires_grad=True)
        noise = self._model.noise_slots(numbers)
        with self._model.views.handing_on(numbers, leaf, take):
            loss, terms = self.passes.likelihood_loss(inputs)
            wanted = [leaf, *(p for _, p in noise)]
            found = (
                torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad else (None,) * len(wanted)
            )
        for (slot, _), g in zip(noise, found[1:], strict=True):
            if g is not None:
                take(slot, g)
        return terms

    def update(self, blocks: Sequence[Block], gs: Sequence[Matrix]) -> tuple[Tensor, Tensor]:
        """As the base's: 𝒜, α and whether the step is taken are of all blocks together."""
        us, vs, fvs = self._products(blocks, gs)
        here = [[dot(v, f), dot(v, v), dot(u, v)] for u, v, f in zip(us, vs, fvs, strict=True)]
        device = self._model.device
        sums = torch.zeros(3, dtype=widest(device), device=device)
        for found in here:
            sums += torch.stack([x.to(sums) for x in found])
        vFv, vv, power = self._over_all(sums)
        damping, options = self.damping, self.options.update
        vFv = vFv + damping * vv
        loss = 0.5 * vFv - power
        if not bool(torch.isfinite(loss) & (power != 0)):
            return loss, torch.zeros((), dtype=torch.bool, device=device)
        if not options.learn_scale:  # (F+γI)v times α, which the op would take of its own blocks
            alpha = torch.where(vFv > 0, power / vFv, 1)
            fvs = [
                f * alpha.to(f) + v * ((alpha - 1) * damping).to(f) for f, v in zip(fvs, map(dense, vs), strict=True)
            ]
        ok = torch.ones((), dtype=torch.bool, device=device)
        if blocks:
            _, ok = self.ops.lambda_step(blocks, us, vs, fvs, replace(options, damping=damping, learn_scale=True))
        return loss, self._model.everywhere(ok)

    def _products(
        self, blocks: Sequence[Block], gs: Sequence[Matrix]
    ) -> tuple[list[Matrix], list[Matrix], list[Tensor]]:
        """As the base's; F v over all ranks' batches."""
        us = self.directions(blocks, gs)
        scales = self._scales(blocks) if blocks else None
        vs: list[Matrix] = self.ops.qv(blocks, us) if blocks else []
        given = vs if scales is None else scaled(vs, scales)
        products = self._sharded_product(blocks, given)
        return us, vs, products if scales is None else [dense(f) for f in scaled(products, scales)]

    def _sharded_product(self, blocks: Sequence[Block], vs: Sequence[Matrix]) -> list[Tensor]:
        """F v of the blocks of this rank, over all ranks' batches."""
        model, passes = self._model, self.passes
        inputs, likelihood = self._curvature_batch(), passes.likelihood
        assert likelihood is not None
        mine: dict[Slot, Tensor] = {}
        for block, v in zip(blocks, vs, strict=True):
            number = model.number(block)
            trained = [part.param.requires_grad for part in model.layouts[number].parts]
            pieces = zip(block.split(dense(v)), trained, strict=True)
            mine |= {(number, k): piece for k, (piece, moves) in enumerate(pieces) if moves}
        seed, mode = passes.seed(), passes.mode()

        products: dict[Slot, Tensor] = {}
        reduction = model.reduction(partial(add_up, products))

        def back(tangent: Tensor) -> Tensor:
            leaf = torch.zeros((), device=model.device, requires_grad=True)
            hand_on = lambda slot, g: reduction.add(slot[0], slot, g.to(model.layouts[slot[0]].dtype))
            with model.views.handing_on(set(range(len(model.layouts))), leaf, hand_on):
                outputs = passes.outputs(inputs)
                detached = outputs.detach()
                cotangent = passes.scoring(inputs).fisher_product(detached, tangent.to(detached.dtype))
                if outputs.requires_grad:
                    torch.autograd.grad(outputs, [leaf], cotangent, allow_unused=True)
            noise = model.noise_slots()
            given = dict(model.exchange.whole([slot for slot, _ in noise], mine.get))
            own = likelihood.own_fisher_product(detached, [given[slot].to(p.dtype) for slot, p in noise])
            for (slot, _), product in zip(noise, own, strict=True):
                hand_on(slot, product)
            return torch.sum(cotangent.to(widest(model.device)) * tangent.to(widest(model.device)))

        _, direction = self._directional_derivative(Directions(model.exchange, mine), inputs, seed)
        there = self.ranks.each(lambda: passes.run(inputs, seed, partial(back, direction)))
        reduction.finish(model.device)
        size = self.ranks.size
        found = {slot: t / size for slot, t in products.items()}
        matrices = [b.matrix([found.get((model.number(b), k)) for k in range(len(b.parts))]) for b in blocks]
        if passes.attempts("ggn", "sharded").check_due(mode):
            self._check(there, found, mine)
        return matrices

    def line(self, directions: Directions, inputs: Inputs, seed: int) -> Line:
        """The quadratic model of the loss along them, as ``fisher.step_limit.line``."""
        model, passes = self._model, self.passes
        outputs, tangent = self._directional_derivative(directions, inputs, seed)
        noise = model.noise_slots()
        given = directions.of([slot for slot, _ in noise])
        params = [p for _, p in noise]
        vs = [directions.along(slot, p.detach(), given[slot]).to(p.dtype) for slot, p in noise]
        return passes.run(inputs, seed, lambda: quadratic_model(passes, params, vs, inputs, outputs, tangent))

    def _directional_derivative(
        self, directions: Directions, inputs: Inputs, seed: int
    ) -> tuple[Tensor, Tensor]:
        """This rank's outputs and J v of them, by tangents that a forward pass carries, or where that fails, which is
        told of once, by differences of outputs. Without a graph, as units' own hooks have no forward derivatives.
        """
        passes, views = self.passes, self._model.views
        attempts = passes.attempts("ggn", "forward mode")

        def tangent() -> tuple[Tensor, Tensor]:
            with torch.no_grad(), forward_ad.dual_level(), views.with_directions(directions, forward_ad.make_dual):
                outputs, found = forward_ad.unpack_dual(passes.outputs(inputs))
                kept = outputs.detach().clone()
                return kept, torch.zeros_like(kept) if found is None else found.detach().clone()

        if attempts.due(passes.mode()):
            try:
                found = self.ranks.each(lambda: passes.run(inputs, seed, tangent, twice=True))
                attempts.worked()
                return found
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                attempts.failed()
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                passes.tell_once(
                    "ggn takes differences",
                    f"fisher='ggn' takes differences of the model's outputs from here on, since forward mode failed: "
                    f"{reason}",
                )
        return self.ranks.each(lambda: self._by_differences(directions, inputs, seed))

    @precision_scope("highest")  # whose small differences TF32 would drown
    def _by_differences(self, directions: Directions, inputs: Inputs, seed: int) -> tuple[Tensor, Tensor]:
        passes, model = self.passes, self._model
        parts = {(b, k): part for b, block in enumerate(model.layouts) for k, part in enumerate(block.parts)}
        params = {slot: model.sharding.local(part, part.param).detach() for slot, part in parts.items()}
        decays = [directions.decay[slot] * params[slot] for slot in directions.decay]
        here = torch.zeros(3, dtype=widest(model.device), device=model.device)
        for k, tensors in enumerate((params.values(), decays, directions.mine.values())):
            for t in tensors:
                here[k] += t.detach().to(here).square().sum()
        over = self._over_all(here)
        theta, decay = over[:2] if model.sharding.units else here[:2]  # of which every rank has its pieces, or all
        v = over[2] + decay
        unit = max(torch.finfo(p.dtype).eps for p in params.values()) ** (1 / 3)
        step = unit * torch.where(theta > 0, theta, 1).sqrt() / torch.where(v > 0, v, 1).sqrt()

        def side(sign: int) -> Tensor:
            moved = lambda w, v: (w + (sign * step).to(v) * v).to(w.dtype)
            with torch.no_grad(), model.views.with_directions(directions, moved):
                return passes.outputs(inputs).detach().clone()

        plus, minus = (passes.run(inputs, seed, partial(side, sign)) for sign in (1, -1))
        return (plus + minus) / 2, (plus - minus) / (2 * step).to(plus)

    def _check(self, there: Tensor, found: Mapping[Slot, Tensor], mine: Mapping[Slot, Tensor]) -> None:
        """⟨w, J v⟩ = ⟨Jᵀw, v⟩, both over all ranks. WrongDerivative where that does not hold: a parameter is used
        outside of the unit that has it, or an operation hides from one derivative.
        """
        model = self._model
        wide = widest(model.device)
        own = {slot for slot, _ in model.noise_slots()}
        both = [slot for slot in found if slot in mine and slot not in own]
        terms = [torch.sum(found[slot].to(wide) * mine[slot].to(wide)) for slot in both]
        back = self._over_all(torch.stack([*terms, there.new_zeros(())]).sum())
        (forward,) = self.ranks.sums([float(there) / self.ranks.size])
        dtype = model.layouts[0].params[0].dtype
        if abs(forward - float(back)) > TOLERANCE.get(dtype, 0.1) * max(abs(forward), abs(float(back))):
            raise WrongDerivative(
                f"vᵀFv should be one number but is {forward} by J v and {float(back)} by backward passes: does a "
                "module use torch.no_grad(), or a parameter while the module that was given to fully_shard around it "
                "does not run? update_aux_every=0 learns without, from the Kronecker factors alone"
            )

    def drawn_gradients(self, blocks: Sequence[Block]) -> list[Tensor]:
        """As the base's: of the blocks of this rank."""
        model, inputs = self._model, self._curvature_batch()
        found: dict[Slot, Tensor] = {}
        reduction = model.reduction(partial(add_up, found))
        hand_on = lambda slot, g: reduction.add(slot[0], slot, g.to(model.layouts[slot[0]].dtype))
        every = set(range(len(model.layouts)))
        seed = self.passes.seed()
        self.ranks.each(lambda: self.passes.run(inputs, seed, partial(self._drawn, inputs, every, hand_on)))
        reduction.finish(model.device)
        size = self.ranks.size
        whole = lambda b, k: None if (g := found.get((model.number(b), k))) is None else g / size
        return [b.matrix([whole(b, k) for k in range(len(b.parts))]) for b in blocks]


class _ShardedLayerPass(LayerPass):
    """Which asks autograd for a leaf of its own where a parameter would have to be asked for."""

    def __init__(self, model: ShardedModel, blocks: Sequence[Block], take: Any) -> None:
        super().__init__(blocks, take, of_unseen=False)
        self._model = model
        self._leaf = torch.zeros((), device=model.device, requires_grad=True)

    def run(self, passes: IsolatedPasses, inputs: Inputs) -> float:
        """As the base's."""
        numbers = {self._model.number(b) for b in self._blocks}
        with self._model.views.handing_on(numbers, self._leaf, lambda slot, g: None):
            return super().run(passes, inputs)

    def _leaves(self, block: Block) -> Iterable[Tensor]:
        return [self._leaf]


class _ShardedLayerCheck(LayerCheck):
    """Whose gradients are handed on, and not kept."""

    def __init__(self, model: ShardedModel, blocks: Sequence[Block]) -> None:
        super().__init__(blocks)
        self._model = model
        self._leaf = torch.zeros((), device=model.device, requires_grad=True)
        self._true = {model.number(b): torch.zeros(b.shape[0], dtype=b.dtype, device=model.device) for b in blocks}

    def run(self, passes: IsolatedPasses, inputs: Inputs) -> float:
        """As the base's."""
        with self._model.views.handing_on(set(self._true), self._leaf, self._multiply):
            return super().run(passes, inputs)

    def _wanted(self, passes: IsolatedPasses) -> Iterable[Tensor]:
        return [self._leaf]

    def _leaves(self, block: Block) -> Iterable[Tensor]:
        return [self._leaf]

    def _multiply(self, slot: Slot, g: Tensor) -> None:
        number, k = slot
        block = self._model.layouts[number]
        sizes, r = block.layout[0], probe(block)
        first = sum(sizes[:k])
        if block.axis:
            self._true[number] += g.reshape(g.shape[0], -1).to(r) @ r[first : first + sizes[k]]
        else:
            self._true[number][first : first + sizes[k]] += g.reshape(-1).to(r) * r

    def _excess(self, block: Block, r: Tensor, product: Tensor, square: Tensor, eps: float) -> Tensor:
        return self._excess_over(self._true[self._model.number(block)], block, product, square, eps)


def _expected(model: ShardedModel, due: Sequence[Block]) -> Iterator[Expected]:
    """What ranks tell each other of the moments of blocks: whether they found any, and which."""
    for block in due:
        number = model.number(block)
        yield Expected(number, (number, ""), torch.Size((1,)), block.dtype)
        for name, t in block.structure.new_moments().items():
            yield Expected(number, (number, name), t.shape, t.dtype)


class _SharedMoments:
    """Second moments that ranks find of their parts of a batch, averaged on the owners of their blocks.

    Those that are not finite on some rank are left out there. ``take``: is given the number of a block and its average.
    """

    def __init__(self, model: ShardedModel, due: Sequence[Block], take: Any) -> None:
        self._model, self._take = model, take
        self._open: tuple[int, Aux] | None = None  # of which more may come
        self._sums: dict[int, dict[str, Tensor]] = {}
        self._reduction = Reduction(model.sharding, model.owners, self._add, _expected(model, due))

    def add(self, share: Share) -> None:
        """What a pass told of some blocks."""
        for block, statistics in zip(share.blocks, share.statistics, strict=True):
            number = self._model.number(block)
            if isinstance(statistics, LayerStatistics):
                found = block.structure.layer_moments(*statistics)
            else:
                found = statistics
            if share.more and self._open is not None and self._open[0] == number:
                self._open = number, {name: t + found[name] for name, t in self._open[1].items()}
                continue
            self._close()
            self._open = number, found

    def _close(self) -> None:
        if self._open is None:
            return
        (number, found), self._open = self._open, None
        finite = bool(found) and all(bool(torch.isfinite(t.sum())) for t in found.values())
        flag = torch.full((1,), float(finite), dtype=self._model.layouts[number].dtype, device=self._model.device)
        self._reduction.add(number, (number, ""), flag)
        for name, t in found.items():
            self._reduction.add(number, (number, name), t if finite else torch.zeros_like(t))

    def _add(self, key: tuple[int, str], t: Tensor) -> None:
        number, name = key
        self._sums.setdefault(number, {})[name] = t.clone()

    def finish(self) -> None:
        """Nothing more comes."""
        self._close()
        self._reduction.finish(self._model.device)
        for number, sums in sorted(self._sums.items()):
            count = sums.pop("")
            if sums and bool(count > 0):
                self._take(number, {name: t / count for name, t in sums.items()})
