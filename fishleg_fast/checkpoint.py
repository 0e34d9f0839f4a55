"""Matching a saved optimizer state with blocks, and copying it into them without loss of precision."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .model.block import Block


def _leaves(live: dict, saved: Any, where: str) -> Iterator[tuple[Tensor, Tensor]]:
    """(live tensor, saved tensor) pairs; ValueError where names or shapes differ."""
    if not isinstance(saved, dict) or set(saved) != set(live):
        names = sorted(saved) if isinstance(saved, dict) else saved
        raise ValueError(
            f"state_dict: {where} should hold {sorted(live)} but holds: {names}; was it saved with another structure?"
        )
    for name, value in live.items():
        if isinstance(value, dict):
            yield from _leaves(value, saved[name], f"{where}[{name!r}]")
        elif not isinstance(saved[name], Tensor) or saved[name].shape != value.shape:
            got = tuple(saved[name].shape) if isinstance(saved[name], Tensor) else saved[name]
            raise ValueError(f"state_dict: {where}[{name!r}] should have shape {tuple(value.shape)} but is: {got}")
        else:
            yield value, saved[name]


def match(blocks: list[Block], param_groups: list[dict], state_dict: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Every live tensor of the blocks with its saved one.

    ValueError where the state is another optimizer's or model's.
    """
    if "fishleg" not in state_dict:
        raise ValueError("state_dict should come from FishLeg.state_dict() but has no 'fishleg' entry")
    saved_ids = list(chain.from_iterable(g["params"] for g in state_dict["param_groups"]))
    params = list(chain.from_iterable(g["params"] for g in param_groups))
    if len(saved_ids) != len(params):
        raise ValueError(f"state_dict should be of {len(params)} parameters but is of: {len(saved_ids)}")
    id_of = {id(p): saved for p, saved in zip(params, saved_ids, strict=True)}
    pairs = []
    for block in blocks:
        live = {name: value for name, value in block.state().items() if name != "product"}
        saved = state_dict["state"].get(id_of[id(block.parts[0].param)], {})
        if block.key:
            saved = saved.get(block.key, {})
        if isinstance(saved, dict):
            if "product" in saved:
                live["product"] = block.buffers()[0]
            if "moments_weight" in saved:
                saved = {"unit": torch.ones(()), **saved}  # states of before there were units
            if not block.key:
                saved = {name: value for name, value in saved.items() if name in live} or saved
        pairs += list(_leaves(live, saved, f"the state of {block.name!r}"))
    return pairs


def restore(blocks: list[Block], pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy every saved tensor into its live one."""
    for live, saved in pairs:
        live.copy_(saved)
    restored = {id(live) for live, _ in pairs}
    for block in blocks:
        block.product_version = block.structure.version if id(block.product) in restored else None


def publish(blocks: Sequence[Block], state: MutableMapping[Tensor, Any]) -> None:
    """Let an optimizer's ``state`` show the blocks' live tensors, each under the first parameter of its block."""
    for block in blocks:
        entry = state[block.parts[0].param]
        if block.key:
            entry[block.key] = block.state()
        else:
            entry.pop("product", None)
            entry.update(block.state())
