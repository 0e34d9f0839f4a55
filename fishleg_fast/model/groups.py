"""Which parameter group each block's parameters are in, while groups, parameters and modules come and go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn

from .block import Block


def with_beta(group: dict[str, Any]) -> dict[str, Any]:
    """The group with "beta" and "momentum", where it has either: schedulers (OneCycleLR, CyclicLR) know the latter."""
    either = next((group[name] for name in ("beta", "momentum") if name in group), None)
    return group if either is None else {**group, "beta": either, "momentum": either}


class Changes(NamedTuple):
    """What is to follow from parameters that came and went."""

    gone: list[Block]  # whose parameters are not all in the groups and in the model any more
    new: list[nn.Parameter]  # of the groups and the model, in no other block


class GroupAssignment:
    """Keeps ``block.groups`` true, and finds where groups, model and blocks have drifted apart.

    ``roots``: (prefix of names, module) of what is trained.
    """

    def __init__(self, roots: Sequence[tuple[str, nn.Module]]) -> None:
        self._roots = roots
        self._assigned: list[list[int]] = []  # the groups and parameters that the blocks were told of
        self._mixed: list[Block] = []  # whose parameters are in several groups
        self._betas: dict[int, float] = {}  # each group's when it was last looked at, by id
        self._places: dict[int, tuple[nn.Module, list[str]]] = {}  # by id, of the groups': root, and path in it
        self._names: dict[int, str] = {}  # by id, of all parameters of the model when changes were last settled

    def current(self, param_groups: Sequence[dict[str, Any]]) -> bool:
        """Whether groups have the parameters that they had when ``assign`` was last called."""
        return self._assigned == _ids(param_groups)

    def left(self, params: Iterable[nn.Parameter]) -> bool:
        """Whether any of these parameters of blocks is no longer where it was in the model."""
        return any(_at(*self._places[id(p)]) is not p for p in params if id(p) in self._places)

    def changes(self, blocks: Sequence[Block], param_groups: Sequence[dict[str, Any]], settled: bool = True) -> Changes:
        """Which blocks and parameters went and came.

        ValueError where a group has a parameter that is not the model's, unless the one that took its place in the
        model is in a group too, or is not to be trained; and, if the groups are ``settled``, where others that came
        since they last were are to be trained and in none.
        """
        names = {id(p): prefix + name for prefix, root in self._roots for name, p in root.named_parameters()}
        grouped = {id(p) for group in param_groups for p in group["params"]}
        for number, group in enumerate(param_groups):
            for position, p in enumerate(group["params"]):
                if id(p) not in names and not self._replaced(p, grouped):
                    raise ValueError(self._stranger(p, f"param_groups[{number}]['params'][{position}]"))
        if settled:
            self._settle(names, grouped, param_groups)
        gone = [b for b in blocks if any(id(p) not in grouped or id(p) not in names for p in b.model_params)]
        leaving = set(map(id, gone))
        covered = {id(p) for b in blocks if id(b) not in leaving for p in b.model_params}
        new = [p for group in param_groups for p in group["params"] if id(p) in names and id(p) not in covered]
        return Changes(gone, new)

    def _replaced(self, p: nn.Parameter, grouped: set[int]) -> bool:
        """Whether the group's p left the model without leaving there what ought to be trained and is not."""
        if id(p) not in self._places:
            return False
        other = _at(*self._places[id(p)])
        return other is None or id(other) in grouped or not other.requires_grad

    def _settle(self, names: dict[int, str], grouped: set[int], param_groups: Sequence[dict[str, Any]]) -> None:
        """Take note of the model's parameters. ValueError where a group's left and others came that are in no group."""
        everything = (p for _, root in self._roots for p in root.parameters())
        came = [
            names[id(p)]
            for p in everything
            if p.requires_grad and id(p) not in grouped and p.numel() and self._names.get(id(p)) != names[id(p)]
        ]
        for number, group in enumerate(param_groups):
            for position, p in enumerate(group["params"]):
                if came and id(p) in self._names and id(p) not in names:
                    raise ValueError(
                        f"param_groups[{number}]['params'][{position}], of shape {tuple(p.shape)}, was "
                        f"{self._names[id(p)]!r} of the model and has left it, while parameters have come that are "
                        f"trainable and in no group: {_listed(came)}; train those with add_param_group or freeze them, "
                        "or take the one that left out of its group"
                    )
        self._names = names

    def _stranger(self, p: nn.Parameter, where: str) -> str:
        if id(p) not in self._places:
            return f"{where} should be a parameter of the model, but is not, of shape: {tuple(p.shape)}"
        root, path = self._places[id(p)]
        prefix = next(prefix for prefix, other in self._roots if other is root)
        return (
            f"{where}, of shape {tuple(p.shape)}, was {prefix + '.'.join(path)!r} of the model, which has another "
            "parameter there by now, in no group: put that one into the group, or train it with add_param_group"
        )

    def assign(self, blocks: Sequence[Block], param_groups: Sequence[dict[str, Any]], settled: bool = True) -> None:
        """Tell the blocks their parameters' groups, and note where those parameters are. Groups that are not
        ``settled`` are to be looked at again.
        """
        self._assigned = _ids(param_groups) if settled else []
        self._betas = {id(group): self._betas.get(id(group), group["beta"]) for group in param_groups}
        group_of = {id(p): group for group in param_groups for p in group["params"]}
        for block in blocks:
            block.groups = [group_of[id(p)] for p in block.model_params]
        self._mixed = [block for block in blocks if any(group is not block.groups[0] for group in block.groups)]
        found = {id(p): (root, name.split(".")) for _, root in self._roots for name, p in root.named_parameters()}
        self._places = {
            i: found[i] if i in found else self._places[i] for i in group_of if i in found or i in self._places
        }

    def check(self, param_groups: Sequence[dict[str, Any]]) -> None:
        """ValueError where a block's groups differ in beta, which a scheduler may have set as "momentum"."""
        for group in param_groups:
            beta = group.get("momentum", group["beta"])  # groups saved before there was that name have none
            if beta == self._betas[id(group)]:
                beta = group["beta"]
            self._betas[id(group)] = group["beta"] = group["momentum"] = beta
        for block in self._mixed:
            if any(group["beta"] != block.beta for group in block.groups):
                raise ValueError(
                    f"beta should be one for all parameters of {block.name!r}, but its groups differ in it"
                )


def _listed(names: Sequence[str], most: int = 5) -> str:
    listed = ", ".join(map(repr, names[:most]))
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"


def _ids(param_groups: Sequence[dict[str, Any]]) -> list[list[int]]:
    return [[id(group), *map(id, group["params"])] for group in param_groups]


def _at(root: nn.Module, path: Sequence[str]) -> nn.Parameter | None:
    """The parameter of that path; None where there is none."""
    module: nn.Module | None = root
    for name in path[:-1]:
        module = None if module is None else module._modules.get(name)
    return None if module is None else module._parameters.get(path[-1])
