"""Which parameter group each block's parameters are in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .block import Block


class GroupAssignment:
    """Keeps ``block.groups`` true while groups and parameters come and go."""

    def __init__(self) -> None:
        self._assigned: list[list[int]] = []  # the groups and parameters that the blocks were told of

    def update(self, blocks: Sequence[Block], param_groups: Sequence[dict[str, Any]]) -> None:
        """Tell the blocks their parameters' groups: none where one was taken out.

        ValueError where a block's groups differ in beta.
        """
        grouped = [[id(group), *map(id, group["params"])] for group in param_groups]
        if grouped != self._assigned:
            self._assigned = grouped
            group_of = {id(p): group for group in param_groups for p in group["params"]}
            for block in blocks:
                taken = all(id(p) in group_of for p in block.params)
                block.groups = [group_of[id(p)] for p in block.params] if taken else []
        for block in blocks:
            if any(group is not block.groups[0] and group["beta"] != block.beta for group in block.groups[1:]):
                raise ValueError(
                    f"beta should be one for all parameters of {block.name!r}, but its groups differ in it"
                )
