"""The launches of a θ step, in order, prepared from its plan."""

from __future__ import annotations

from ...device.polar import unit_kernel
from ...device.products import left_kernel, right_kernel
from ...device.theta_step import diagonal_kernel, fused_kernel, update_kernel
from ..configurations import COPY, ELEMENTWISE
from ..diagkron import core_launches
from ..launch import DTYPES, Launch
from .plan import ThetaPlan


class ThetaLaunches:
    """first: what makes nat and its sums; last: what moves θ, and takes (norms, ok) besides."""

    def __init__(self, plan: ThetaPlan) -> None:
        self.first: list[Launch] = []
        self.last: list[Launch] = []
        if plan.fuses:
            self._fused(plan)
        else:
            self._separate(plan)

    def _fused(self, plan: ThetaPlan) -> None:
        """With normalize=None, of Kron's kind alone: what would be a third is in the second's epilogue."""
        (group,) = plan.groups
        rows = group.rows.upload(plan.device, plan.table)
        shared = {"device": plan.device, **group.product_constants()}
        entries, count = group.right_tiles()
        constants = {"SOURCE": "g" if plan.after else "mg", "COUNT": True, "CHECK": True, **shared}
        self.first.append(Launch(right_kernel, count, (rows, entries, plan.corrections, plan.broken), constants))
        entries, count = group.left_tiles()
        sums = (plan.partials, plan.slots, plan.sums, plan.sums.shape[1], plan.arrived)
        constants = {"AFTER": plan.after, "W": DTYPES[group.rows.W], **shared}
        self.last.append(Launch(fused_kernel, count, (rows, entries, plan.corrections, plan.broken, *sums), constants))

    def _separate(self, plan: ThetaPlan) -> None:
        device, rule = plan.device, plan.options.normalize or "none"
        blocks = plan.sums.shape[1]
        scalars = (plan.corrections, plan.partials, plan.slots, plan.sums, blocks, plan.arrived)
        sums = {"rms": "rms", "spectral": "rms", "trust": "trust", "none": "norm"}[rule]
        tables = [(group, group.rows.upload(device, plan.table)) for group in plan.groups]
        for group, rows in tables:
            shared = {"device": device, **group.product_constants()}
            entries, count = group.right_tiles()
            constants = {"SOURCE": "g" if plan.after else "mg", "COUNT": True, "CHECK": False, **shared}
            self.first.append(Launch(right_kernel, count, (rows, entries, plan.corrections, plan.broken), constants))
            self.first += core_launches(group.core_rows, plan.table, group.precision, group.config, device)
            entries, count = group.left_tiles()
            constants = {"SUMS": sums, "AFTER": plan.after, "SQUARED": False, **shared}
            self.first.append(Launch(left_kernel, count, (rows, entries, *scalars), constants))
        elementwise = {"device": device, "per_processor": 4, **ELEMENTWISE._asdict()}
        for group, rows in tables:
            entries, count = group.diagonal_tiles()
            constants = {"SUMS": sums, "AFTER": plan.after, **group.rows.gradient_constants(), **elementwise}
            self.first.append(Launch(diagonal_kernel, count, (rows, entries, *scalars), constants))
        for group, rows in tables:
            entries, count = group.unit_tiles()
            constants = {"AFTER": plan.after, "DIAGONAL": bool(group.diagonal), **group.rows.constants()}
            constants |= {"device": device, "per_processor": 4, **COPY._asdict()}
            self.first.append(Launch(unit_kernel, count, (rows, entries, plan.sums), constants))
        for factors in plan.polar_factors.values():
            self.first += factors.launches
        for group, rows in tables:
            entries, count = group.update_tiles()
            constants = {"RULE": rule, "AFTER": plan.after, "DIAGONAL": bool(group.diagonal)}
            constants |= {"W": DTYPES[group.rows.W], **group.rows.constants(), **elementwise}
            args = (rows, entries, plan.corrections, plan.sums, blocks, plan.options.kappa)
            self.last.append(Launch(update_kernel, count, args, constants))
        self.first = [launch for launch in self.first if launch.tiles]
        self.last = [launch for launch in self.last if launch.tiles]
