"""Matching a saved optimizer state with blocks, and copying it into them without loss of precision.

All of it is in ``state`` and ``param_groups``, where torch's own tools look for it: a block's under its first trainable
parameter, counters in the first group's "fishleg".
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .model.block import Block

_ADAM = ("exp_avg", "exp_avg_sq")  # there only where λ is or was learned by Adam
VERSION = 2  # of the first group's "fishleg"; in version 1 it was beside the groups


def _leaves(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """What nested dicts hold, by dotted path: torch.distributed.checkpoint flattens them to those, and back."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found.update(_leaves(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value})
    return found


def _pairs(live: dict[str, Any], saved: dict[str, Any], where: str) -> list[tuple[Tensor, Tensor]]:
    """(live tensor, saved tensor); ValueError where names or shapes differ."""
    if set(saved) != set(live):
        raise ValueError(
            f"state_dict: {where} should hold {sorted(live)} but holds: {sorted(saved)}; was it saved with another "
            "structure?"
        )
    for name, value in live.items():
        if not isinstance(saved[name], Tensor) or saved[name].shape != value.shape:
            got = tuple(saved[name].shape) if isinstance(saved[name], Tensor) else saved[name]
            raise ValueError(f"state_dict: {where}[{name!r}] should have shape {tuple(value.shape)} but is: {got}")
    return [(value, saved[name]) for name, value in live.items()]


def progress(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The saved counters, and where generators and loaders are; ValueError where there are none that are known here."""
    old = state_dict.get("fishleg")
    if old is not None:  # version 1
        loader = {f"loader_{name}": value for name, value in (old["aux_loader"] or {}).items()}
        return {**old["counts"], "terms": old.get("terms", 1.0), "generator": old["generator"], **loader}
    found = [group["fishleg"] for group in state_dict.get("param_groups", ()) if "fishleg" in group]
    if not found:
        raise ValueError(
            "state_dict should come from FishLeg.state_dict() but has no 'fishleg' entry in a parameter group; another "
            "optimizer's state cannot be taken over: load the model's alone, and start FishLeg without it"
        )
    if found[0].get("version") != VERSION:
        raise ValueError(
            f"state_dict should be of version {VERSION} but is of: {found[0].get('version')}; load it with the version "
            "of fishleg_fast that saved it"
        )
    return found[0]


def _saved_state(block: Block, states: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The block's, among the saved states of its parameters; None where they have none of it."""
    for state in states:
        state = state.get(block.key, {}) if block.key else state
        if isinstance(state, dict) and "momentum" in state:
            return _leaves(state)
    return None


@dataclass(frozen=True)
class Match:
    """What a saved state has for blocks."""

    pairs: list[tuple[Tensor, Tensor]]  # (live tensor, saved tensor)
    adams: list[tuple[Block, dict[str, Tensor]]]  # Adam's moments of λ, by dotted path; none where it was not learned


def match(blocks: list[Block], param_groups: list[dict], state_dict: dict[str, Any]) -> Match:
    """Every live tensor of the blocks with its saved one; those of frozen blocks may be missing.

    ValueError where the state is another optimizer's or model's.
    """
    saved_ids = list(chain.from_iterable(g["params"] for g in state_dict["param_groups"]))
    params = list(chain.from_iterable(g["params"] for g in param_groups))
    if len(saved_ids) != len(params):
        raise ValueError(f"state_dict should be of {len(params)} parameters but is of: {len(saved_ids)}")
    id_of = {id(p): saved for p, saved in zip(params, saved_ids, strict=True)}
    pairs = []
    adams: list[tuple[Block, dict[str, Tensor]]] = []
    for block in blocks:
        saved = _saved_state(block, [state_dict["state"].get(id_of[id(p)], {}) for p in block.model_params])
        if saved is None and not any(p.requires_grad for p in block.model_params):
            continue
        saved, live = saved or {}, block.state()
        live.pop("product", None)
        if "product" in saved:
            live["product"] = block.buffers()[0]
        adam = {name: saved.pop(name) for name in list(saved) if name.split(".")[0] in _ADAM}
        if adam:
            like = {f"{moment}.{name}": t for moment in _ADAM for name, t in block.structure.fishleg_aux.items()}
            _pairs(like, adam, f"the state of {block.name!r}")
        adams.append((block, adam))
        for moment in _ADAM:
            live.pop(moment)
        if "moments_weight" in saved:
            saved.setdefault("unit", torch.ones((), device="cpu"))  # states of before there were units
        known = {name: value for name, value in saved.items() if name.split(".")[0] in live}
        pairs += _pairs(_leaves(live), known, f"the state of {block.name!r}")
    return Match(pairs, adams)


def saved_counters(param_groups: list[dict], state_dict: dict[str, Any]) -> dict[int, Tensor]:
    """How often the block of each parameter was stepped, by the parameter's id, where that was saved."""
    saved_ids = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
    params = chain.from_iterable(g["params"] for g in param_groups)
    found = {id(p): state_dict["state"].get(saved, {}).get("step") for p, saved in zip(params, saved_ids, strict=True)}
    return {p: step for p, step in found.items() if isinstance(step, Tensor)}


def restore(blocks: list[Block], found: Match) -> None:
    """Copy every saved tensor into its live one."""
    for live, saved in found.pairs:
        live.copy_(saved)
    for block, adam in found.adams:
        if adam:  # also where λ is not learned any more: it goes on as it was saved
            block.allocate_adam()
        for name, t in _leaves({moment: getattr(block, moment) for moment in _ADAM}).items():
            t.copy_(adam[name]) if adam else t.zero_()
    restored = {id(live) for live, _ in found.pairs}
    for block in blocks:
        block.product_version = block.structure.version if id(block.product) in restored else None


def publish(
    blocks: Sequence[Block],
    param_groups: Sequence[dict],
    state: MutableMapping[Tensor, Any],
    others: Mapping[Tensor, Tensor] | None = None,
) -> None:
    """Let an optimizer's ``state`` show the blocks' live tensors: each block's under its first trainable parameter, and
    its counter under the others; ``others``: counters of parameters of blocks elsewhere.
    """
    state.clear()
    for p, counter in (others or {}).items():
        state[p] = {"step": counter}
    for block in blocks:
        home = next((p for p in block.model_params if p.requires_grad), block.model_params[0])
        for p in block.model_params:
            entry = state.setdefault(p, {})
            if p is not home:
                entry.setdefault("step", block.step)
            elif block.key:
                entry[block.key] = block.state()
                entry.setdefault("step", block.step)  # as ranks have it that do not own the block
            else:
                entry.update(block.state())
    for p in chain.from_iterable(group["params"] for group in param_groups):
        if p not in state:  # empty, or not the model's any more
            state[p] = {"step": torch.zeros((), device="cpu")}


def forgotten(blocks: Sequence[Block], state: Mapping[Tensor, Any]) -> list[Block]:
    """The blocks that the user has let go of the state of, as for an optimizer's start anew, by any of its parameters;
    and those that share parameters with them.
    """
    gone: list[Block] = []
    absent = {id(p) for b in blocks for p in b.params if p not in state}
    while len(found := [b for b in blocks if any(id(p) in absent for p in b.params)]) > len(gone):
        gone = found
        absent.update(id(p) for b in gone for p in b.params)
    return gone
