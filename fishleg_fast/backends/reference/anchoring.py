"""Anchoring, in plain torch: equal blocks together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from ...algebra.maths import Aux
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
    weights = weights_of(blocks)
    stacks = stacks_of(blocks, more=weights)
    equal = [stack for stack in stacks if len(stack.blocks) > 1 and _plain(stack)]
    rest = [block for stack in stacks if stack not in equal for block in stack.blocks]
    with precision_scope("highest"):  # of a triangular inverse that λ starts from
        right = []
        for stack in equal:
            mine = stack.blocks
            divisors = moments_divisor(mine[0], together([b.unit for b in mine]), weights[stack.numbers[0]])
            right.append(stacked.start_kfac(stack.structures, [b.moments for b in mine], damping, divisors))
        flags = torch.cat([flag.cpu() for flag in right]).tolist() if right else []
        tried = [block for stack in equal for block in stack.blocks]
        for block in (*rest, *(b for b, done in zip(tried, flags, strict=True) if not done)):
            block.structure.start_kfac(block.moments, damping, block.moments_divisor)


def _plain(stack: Stack) -> bool:
    return all(type(s).start_kfac is Structure.start_kfac for s in stack.structures)
