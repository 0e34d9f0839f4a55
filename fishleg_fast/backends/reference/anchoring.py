"""Anchoring, in plain torch: equal blocks together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor

from ...algebra.maths import Aux
from ...algebra.natural import rate_of
from ...algebra.stacks import alike, together
from ...algebra.structures import stacked
from ...algebra.structures.base import LayerStatistics, Structure, finite
from ...model.block import Block, moments_divisor, weights_of
from ...model.stack import Stack, stacks_of
from ...precision import precision_scope


def average_moments(
    blocks: Sequence[Block], statistics: Sequence[LayerStatistics | Aux], decay: float, more: bool = False
) -> list[Block]:
    """Moving averages of the Kronecker factors, and the blocks whose moved: see ``protocol.Ops``."""
    keep, weight = 1.0 if more else decay, 1 - decay
    given = [(block, new) for block, new in zip(blocks, statistics, strict=True) if new]
    done: list[Block] = []
    stacks: list[tuple[list[Block], Aux]] = []  # and their new moments
    for group in alike([_key(*pair) for pair in given], [_entries(*pair) for pair in given]):
        mine, news = [given[k][0] for k in group], [given[k][1] for k in group]
        if len(group) > 1:
            stacks.append((mine, _new_moments(mine, news)))
        elif mine[0].structure.average(mine[0].moments, news[0], weight, keep):  # without a copy of what is new
            done += mine
    flags = torch.cat([finite(new, 1).cpu() for _, new in stacks]).tolist() if stacks else []
    for mine, new in stacks:
        right = [k for k in range(len(mine)) if flags[k]]
        flags = flags[len(mine) :]
        for name, moments in new.items():
            olds = [mine[k].moments[name] for k in right]
            torch._foreach_mul_(olds, keep)
            torch._foreach_add_(olds, [moments[k] for k in right], alpha=weight)
        done += [mine[k] for k in right]
    if not more and done:
        weights = [block.moments_weight for block in done]
        torch._foreach_mul_(weights, decay)
        torch._foreach_add_(weights, weight)
    return done


def _entries(block: Block, new: LayerStatistics | Aux) -> int:
    tensors = [*block.moments.values(), *(new[:2] if isinstance(new, LayerStatistics) else new.values())]
    return sum(t.numel() for t in tensors)


def _key(block: Block, new: LayerStatistics | Aux) -> Hashable | None:
    """Equal where blocks' new moments can be made together; None where this one's cannot."""
    kind = stacked.kind(block.structure)
    if kind is None:
        return None
    if isinstance(new, LayerStatistics):
        return kind, new.a.shape, new.a.dtype, new.e.shape, new.e.dtype, new.terms, new.positions
    return kind, tuple((name, t.shape, t.dtype) for name, t in new.items())


def _new_moments(blocks: Sequence[Block], news: Sequence[LayerStatistics | Aux]) -> Aux:
    """Of equal blocks, with a dimension in front."""
    shown = [new for new in news if isinstance(new, LayerStatistics)]
    if shown:
        return stacked.layer_moments([b.structure for b in blocks], shown)
    return stacked.joined([new for new in news if isinstance(new, dict)])


def start_kfac(blocks: Sequence[Block], damping: float) -> None:
    """Q from the moving averages as they are: see ``protocol.Ops``."""

    def together_(mine: Sequence[Block], divisors: Tensor, weight: float) -> Tensor:
        return stacked.start_kfac([b.structure for b in mine], [b.moments for b in mine], damping, divisors)

    for block, _ in _one_by_one(blocks, together_):
        block.structure.start_kfac(block.moments, damping, block.moments_divisor)


def natural_step(blocks: Sequence[Block], damping: float, rate: float) -> None:
    """A natural-gradient step of λ: see ``protocol.Ops``."""

    def together_(mine: Sequence[Block], divisors: Tensor, weight: float) -> Tensor:
        rates = divisors.new_full(divisors.shape, rate_of(rate, weight))
        return stacked.step_naturally(
            [b.structure for b in mine], [b.moments for b in mine], damping, rates, divisors
        )  # fmt: skip

    for block, weight in _one_by_one(blocks, together_):
        one = block.unit.new_tensor(rate_of(rate, weight))
        block.structure.step_naturally(block.moments, damping, one, block.moments_divisor)


def _one_by_one(
    blocks: Sequence[Block], together_: Callable[[Sequence[Block], Tensor, float], Tensor]
) -> Iterator[tuple[Block, float]]:
    """The blocks that are not done by ``together_``, which is given equal ones, the divisors of their moments and the
    weight of their averages, and returns for which it was right; with those weights.
    """
    weights = weights_of(blocks)
    stacks = stacks_of(blocks, more=weights)
    equal = [stack for stack in stacks if len(stack.blocks) > 1 and _plain(stack)]
    rest = [k for stack in stacks if stack not in equal for k in stack.numbers]
    with precision_scope("highest"):  # of a triangular inverse that λ starts from
        right = []
        for stack in equal:
            mine, weight = stack.blocks, weights[stack.numbers[0]]
            divisors = moments_divisor(mine[0], together([b.unit for b in mine]), weight)
            right.append(together_(mine, divisors, weight))
        flags = torch.cat([flag.cpu() for flag in right]).tolist() if right else []
        tried = [k for stack in equal for k in stack.numbers]
        for k in (*rest, *(k for k, done in zip(tried, flags, strict=True) if not done)):
            yield blocks[k], weights[k]


def _plain(stack: Stack) -> bool:
    return all(type(s).start_kfac is Structure.start_kfac for s in stack.structures)
