"""The θ step over all blocks: m ← βm + (1−β)g, nat = Q m̂, θ ← θ − lr·(c·nat + wd·θ).

Launches, whatever the number of blocks: 3 for all of Kron, Kron(scale=True) and SumKron (right and left product of
``device/products.py``, then ``update_kernel``); 2 with normalize=None, where the update is the left product's epilogue.
All DiagKron blocks share these 3, with any normalize, and take 2 more between the two products (``diagkron.py``). All
Diagonal blocks take 1 more (``diagonal_kernel``, each block's ‖nat‖²), and share the update. normalize="spectral" takes
19 more before the update: nat/‖nat‖ of all blocks of whichever kind, then six iterations of 3 (``device/polar.py``).

Everything is decided on the device. Non-finite numbers are found by the blocks' sums of squares, in ``update_kernel``
before it writes. With normalize=None no launch lies between the last product and the update: the first product tells,
and elements of nat that are not finite all the same are left out one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....algebra.matrix import Matrix
from ....backends import reference
from ....backends.protocol import ThetaOptions
from ....model.block import Block, advance
from ..plans import plan_of
from ..refresh import refresh_stale
from ..tables.matrices import Given
from .launches import ThetaLaunches
from .plan import ThetaPlan
from .uncovered import UncoveredBlocks


class PreparedStep(ThetaPlan):
    """A plan with its launches."""

    def __init__(self, blocks: Sequence[Block], given: Given, options: ThetaOptions) -> None:
        super().__init__(blocks, given, options)
        if any(self.kinds):
            self.launches = ThetaLaunches(self)


def theta_step(
    blocks: Sequence[Block],
    gs: Sequence[Matrix],
    options: ThetaOptions,
) -> tuple[Tensor, Tensor]:
    """As the reference's; nothing is decided on the host, which only waits where it counts the steps.

    Blocks that the kernels do not cover take their steps by the reference's functions, with the same norms, trust
    region and decision.
    """
    if not blocks:
        return reference.theta_step(blocks, gs, options)
    given = Given(gs, blocks)
    plan = plan_of(blocks, ("θ", options), given.facts(), lambda: PreparedStep(blocks, given, options))
    if not any(plan.kinds):
        return reference.theta_step(blocks, gs, options)
    if plan.needs_refresh():
        refresh_stale([blocks[i] for i in plan.factored])
    read = plan.tell(blocks, given)
    norms = torch.empty(len(blocks), dtype=torch.float32, device=plan.device)
    ok = torch.empty((), dtype=torch.bool, device=plan.device)
    uncovered = UncoveredBlocks(plan, blocks, gs)
    uncovered.add_up()
    for launch in plan.launches.first:
        launch()
    for launch in plan.launches.last:
        launch(norms, ok)
    del read
    uncovered.move(norms, ok)
    _count(plan, blocks, ok)
    return norms, ok


def _count(plan: ThetaPlan, blocks: Sequence[Block], ok: Tensor) -> None:
    """Count the step, and tell autograd what was written to."""
    raised: list[Tensor] = []
    counted: list[Tensor] = []
    for index, (block, kind) in enumerate(zip(blocks, plan.kinds, strict=True)):
        if kind is None:
            counted.append(block.step)
            continue
        block.product_version = None  # m has moved on
        raised += [p.param for p, g in zip(block.parts, block.grads, strict=True) if g is not None]
        (raised if index in plan.counted else counted).append(block.step)
        raised.append(block.momentum)
    if counted:
        on_host = ok.to("cpu") if counted[0].device.type == "cpu" else ok
        advance(counted, on_host)
        plan.count(on_host)
    torch.autograd.graph.increment_version(raised)
