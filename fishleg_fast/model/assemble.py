"""From a model to its blocks: every trainable parameter in exactly one, a tied one in that of its first owner."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from ..algebra.costs import affordable_layout
from ..algebra.structures.base import Structure
from ..algebra.structures.diagkron import DiagKron
from ..algebra.structures.diagonal import Diagonal
from ..algebra.structures.kron import Kron
from ..algebra.structures.sumkron import SumKron
from .block import Block, Part
from .layers import BlockSpec, layer_of
from .modules import AuxView, FishModule, ModuleStructure, _FishLayer

StructureChoice = str | Callable[..., Structure]
STRUCTURES: dict[str, Callable[..., Structure]] = {
    "kron": Kron,
    "diagkron": DiagKron,
    "sumkron": SumKron,
    "diagonal": Diagonal,
}


def check_choice(structure: object) -> None:
    """TypeError or ValueError unless ``structure`` is a known name, a callable, or a mapping of patterns to those."""
    if isinstance(structure, Mapping):
        for choice in structure.values():
            check_choice(choice)
    elif isinstance(structure, str):
        if structure not in STRUCTURES:
            raise ValueError(f"structure should be one of {sorted(STRUCTURES)} but is: {structure!r}")
    elif not callable(structure):
        raise TypeError(
            "structure should be a name, a callable (m, n, **options) -> Structure, or a dict of name patterns "
            "to those "
            f"but is: {structure!r}"
        )


def refuse_uninitialized(model: nn.Module, prefix: str = "") -> None:
    """ValueError where a lazy module has not met its input yet."""
    for name, p in model.named_parameters():
        if isinstance(p, UninitializedParameter):
            raise ValueError(
                f"parameter {prefix + name!r} is not initialized yet: run one forward pass before making the optimizer"
            )


def by_pattern(choice: Any, name: str, otherwise: Any) -> Any:
    """A choice for a layer of that name: of a mapping that of the first pattern that matches, or ``otherwise``."""
    if isinstance(choice, Mapping):
        return next((chosen for pattern, chosen in choice.items() if fnmatchcase(name, pattern)), otherwise)
    return choice


def check_patterns(argument: str, choice: object, blocks: Sequence[Block]) -> None:
    """Warn of a pattern of ``argument`` that no layer's name matches."""
    for pattern in choice if isinstance(choice, Mapping) else ():
        if not any(fnmatchcase(block.name, pattern) for block in blocks):
            warnings.warn(
                f"{argument} has a pattern that no trained layer's name matches: {pattern!r}; the names are "
                f"{', '.join(repr(block.name) for block in blocks)}",
                stacklevel=3,
            )


def normalization_of(blocks: Sequence[Block]) -> str:
    """What normalize="auto" is: "spectral" if at least half of the matrices' entries of which that is known are used at
    several positions.
    """
    known = [b for b in blocks if b.repeated is not None and min(b.shape) > 1]
    sizes = [block.shape[0] * block.shape[1] * (1 if block.repeated else -1) for block in known]
    return "spectral" if sizes and sum(sizes) >= 0 else "rms"


def _make_structure(
    choice: StructureChoice,
    block: Block,
    spec: BlockSpec,
    max_factor_size: int | str | None,
    device: torch.device | None,
) -> Structure:
    options: dict[str, Any] = {"dtype": block.dtype, "device": device or block.parts[0].param.device}
    make = STRUCTURES[choice] if isinstance(choice, str) else choice
    if spec.elementwise or make is Diagonal:
        return Diagonal(block.shape, **options)
    m, n = block.shape
    diagonal = spec.diagonal
    if isinstance(max_factor_size, str):  # "auto"
        unaffordable, max_factor_size = affordable_layout(m, n)
        diagonal = tuple({*diagonal, *unaffordable})
    made = make(m, n, diagonal=diagonal, max_factor_size=max_factor_size, **options)
    if not isinstance(made, Structure) or made.shape != block.shape:
        raise TypeError(
            f"structure for {block.name!r} should make a Structure of shape {block.shape} but made: {made!r}"
        )
    return made


def _claims(module: nn.Module, name: str, free: dict[int, nn.Parameter]) -> Iterator[tuple[BlockSpec, list[Part]]]:
    """The module's specs, each with those of its parts that are trainable, not yet owned, and not empty."""
    own = module._parameters  # the registered ones: a parametrized weight is not among them
    for spec in layer_of(module).specs(module):
        if own.get(spec.parts[0][0]) is None:
            continue
        parts = [Part(p, rows, key) for key, rows in spec.parts if (p := own.get(key)) is not None and id(p) in free]
        if parts:
            yield spec, parts


def build_blocks(
    model: nn.Module,
    parameters: list[nn.Parameter],
    structure: StructureChoice | Mapping[str, StructureChoice],
    max_factor_size: int | str | None,
    prefix: str = "",
    device: torch.device | Callable[[int], torch.device | None] | None = None,
) -> list[Block]:
    """Blocks over those of ``parameters`` that the model holds, in the model's order; each ends in exactly one.

    λ is on ``device``, that of the block's number where it is a function, or where its parameters are.
    """
    free = {id(p): p for p in parameters if p.numel()}
    uses: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            uses[id(p)] = uses.get(id(p), 0) + 1
    blocks: list[Block] = []

    def add(name: str, parts: list[Part], spec: BlockSpec, module: nn.Module | None, choice: StructureChoice) -> None:
        # A tied weight's layer does not tell the whole gradient, nor at how many positions it is used.
        tied = any(uses[id(part.param)] > 1 for part in parts)
        block = Block(prefix + name, parts, spec.axis, Structure(()), spec.suffix, None if tied else module)
        block.repeated = spec.repeated
        where = device(len(blocks)) if callable(device) else device
        block.structure = _make_structure(choice, block, spec, max_factor_size, where)
        blocks.append(block)

    for path, module in model.named_modules():
        if isinstance(module, FishModule) and not isinstance(module, _FishLayer):
            own = [p for p in module.parameters(recurse=False) if id(p) in free]
            if own:
                parts = [Part(p) for p in own]
                made = ModuleStructure(module, [part.param for part in parts])
                blocks.append(Block(prefix + (path or "model"), parts, 0, made))
        else:
            claims = list(_claims(module, path, free))
            for spec, parts in claims:
                name = ".".join(filter(None, [path, spec.suffix])) or "model"
                choice = getattr(module, "structure", None) if isinstance(module, _FishLayer) else None
                add(
                    name,
                    parts,
                    spec,
                    module if spec.shown else None,
                    choice or by_pattern(structure, prefix + name, "kron"),
                )
            own = [part.param for _, parts in claims for part in parts]
        for p in own:
            free.pop(id(p), None)
    for path, p in model.named_parameters():
        if id(p) in free:
            add(path, [Part(p)], BlockSpec("", [], axis=0, elementwise=True), None, "diagonal")
    return blocks


def detach(model: nn.Module, gone: Sequence[Block]) -> None:
    """Take the λ of these blocks from ``module.fishleg_aux`` of whatever module shows it."""
    theirs = {id(t) for block in gone for t in block.structure.fishleg_aux.values()}
    for module in model.modules():
        view = module.__dict__.get("fishleg_aux")
        if isinstance(view, AuxView) and any(id(t) in theirs for t in view.values()):
            object.__setattr__(module, "fishleg_aux", AuxView())
            module.__dict__.pop("_fishleg_blocks", None)


def attach(model: nn.Module, blocks: list[Block]) -> None:
    """Make each block's λ reachable as ``module.fishleg_aux`` of the first module that owns its parameters."""
    owners = {id(p): module for module in reversed(list(model.modules())) for p in module._parameters.values()}
    by_module: dict[int, list[Block]] = {}
    for block in blocks:
        owner = owners.get(id(block.parts[0].param))
        if owner is not None and not isinstance(block.structure, ModuleStructure):
            by_module.setdefault(id(owner), []).append(block)
    for module in model.modules():
        mine = by_module.get(id(module))
        if mine is None:
            continue
        names = {id(p): n for n, p in module._parameters.items()}
        tensors: dict[str, torch.Tensor] = {}
        for block in mine:
            whole = len(mine) == 1
            label = block.name.rpartition(".")[2] if block.parts[0].rows else names[id(block.parts[0].param)]
            tensors.update({k if whole else f"{label}.{k}": t for k, t in block.structure.fishleg_aux.items()})
        object.__setattr__(module, "fishleg_aux", AuxView(tensors))
        if isinstance(module, _FishLayer):
            object.__setattr__(module, "_fishleg_blocks", mine)
