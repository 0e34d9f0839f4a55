"""Passes of the optimizer's through a model whose blocks ranks share out between them.

In one that was given to ``fully_shard`` parameters are whole for as long as the unit runs that they belong to: a module
that was given to it, with those below it that no other unit has. While it does, modules have other tensors in their
parameters' places, as attributes that go before them: with tangents, or such as hand on their gradient, a unit's at a
time, so that no rank ever holds all of either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..model.layers import constant_row
from ..passes.hooks import before_users
from .exchange import Directions, Exchange, Slot
from .sharding import places


class _HandOn(torch.autograd.Function):
    """The parameter as it is; its gradient goes to a function and no further. ``leaf``: what autograd is asked for."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, leaf: Tensor, take: Callable[[Tensor], None]) -> Tensor:
        ctx.take, ctx.leaf = take, leaf
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        ctx.take(grads[0])
        return None, torch.zeros_like(ctx.leaf), None


def _put(module: nn.Module, name: str, t: Tensor) -> None:
    """Have the module find t where it looks for its parameter."""
    module.__dict__[name] = t
    _in_list(module, name, t)


def _take_back(module: nn.Module, name: str) -> None:
    if isinstance(module.__dict__.get(name), Tensor):
        del module.__dict__[name]
        _in_list(module, name, module._parameters[name])


def _take_all_back(held: Sequence[tuple[nn.Module, str]]) -> None:
    for module, name in held:
        _take_back(module, name)


def _in_list(module: nn.Module, name: str, t: Tensor | None) -> None:
    """Recurrent layers take their parameters from a list of their own."""
    if isinstance(module, nn.RNNBase) and name in module._flat_weights_names:
        module._flat_weights[module._flat_weights_names.index(name)] = t


View = Callable[[Tensor, "int | None"], Tensor]  # of a parameter, of which a row may be a constant


class _Place(NamedTuple):
    """Where a module has a parameter, and which parts of blocks it is."""

    module: nn.Module
    name: str
    parameter: int  # its number
    slots: list[Slot]

    @property
    def still(self) -> int | None:
        """A row that the module takes as a constant."""
        return constant_row(self.module, self.name)


class UnitViews:
    """Of the model whose blocks' parts ``exchange`` moves between ranks."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange, self._sharding, self._layouts = exchange, exchange.sharding, exchange.layouts
        slots: dict[int, list[Slot]] = {}
        for b, block in enumerate(self._layouts):
            for k, part in enumerate(block.parts):
                slots.setdefault(id(part.param), []).append((b, k))
        self._slots = list(slots.values())  # of each parameter, by its number
        numbers = {p: number for number, p in enumerate(slots)}
        self._units: dict[int, list[_Place]] = {}
        for unit, module, name, p in places(self._sharding.model, self._sharding.units):
            if id(p) in numbers:
                place = _Place(module, name, numbers[id(p)], slots[id(p)])
                self._units.setdefault(id(unit), []).append(place)

    def _trained(self, place: _Place) -> bool:
        b, k = place.slots[0]
        return self._layouts[b].parts[k].param.requires_grad

    @contextmanager
    def _viewed(self, enter: Callable[[list[_Place]], Mapping[int, View]]) -> Iterator[None]:
        """``enter``, when a unit starts, gives the view to make of each parameter, by number; frozen ones have none."""
        held: list[tuple[nn.Module, str]] = []

        def start(here: list[_Place], module: nn.Module, args: tuple) -> None:
            here = [place for place in here if self._trained(place)]
            views, made = enter(here), dict[tuple[int, int | None], Tensor]()
            for place in here:
                if place.parameter in views:
                    w = place.module._parameters[place.name]
                    assert w is not None
                    key = place.parameter, place.still
                    if key not in made:
                        made[key] = views[place.parameter](w, place.still)
                    _put(place.module, place.name, made[key])
                    held.append((place.module, place.name))

        def stop(here: list[_Place], module: nn.Module, args: tuple, output: Any) -> None:
            for place in here:
                _take_back(place.module, place.name)

        model, units = self._sharding.model, self._sharding.units
        with ExitStack() as stack:
            stack.callback(_take_all_back, held)
            if model not in units:  # what no unit has every rank has whole at any time
                start(self._units.get(id(model), []), model, ())
            for unit in units:
                here = self._units.get(id(unit), [])
                stack.enter_context(before_users(unit, partial(start, here)))
                # Before the unit's own hook, which lets go of its parameters.
                stack.callback(unit.register_forward_hook(partial(stop, here), prepend=True).remove)
            yield

    @contextmanager
    def with_directions(
        self, directions: Directions, combine: Callable[[Tensor, Tensor], Tensor]
    ) -> Iterator[None]:
        """Modules have ``combine(w, v)`` in the place of each parameter w: with a tangent, or moved."""

        def enter(here: list[_Place]) -> dict[int, View]:
            wanted = sorted({slot for place in here for slot in place.slots})
            vs = directions.of(wanted)
            return {
                place.parameter: partial(self._combined, combine, directions, {s: vs[s] for s in place.slots})
                for place in here
            }

        with self._viewed(enter):
            yield

    def _combined(
        self,
        combine: Callable[[Tensor, Tensor], Tensor],
        directions: Directions,
        vs: Mapping[Slot, Tensor],
        w: Tensor,
        still: int | None,
    ) -> Tensor:
        parts = {slot: self._layouts[slot[0]].parts[slot[1]] for slot in vs}
        (first, v), *others = vs.items()
        if not others and parts[first].rows is None:
            whole = v.to(w.dtype)
        else:
            whole = torch.zeros_like(w)
            for slot, part in parts.items():
                part.of(whole).copy_(vs[slot])
        whole = directions.along(first, w, whole)
        if still is not None:
            whole = whole.clone()
            whole[still] = 0
        return combine(w, whole)

    @contextmanager
    def handing_on(self, blocks: set[int], leaf: Tensor, take: Callable[[Slot, Tensor], None]) -> Iterator[None]:
        """Gradients of the parts of ``blocks`` go to ``take`` as backward passes come by them. ``leaf``: what autograd
        has to be asked for so that it does. Backward passes belong inside.
        """

        def hand_on(slots: Sequence[Slot], gradient: Tensor) -> None:
            with torch.no_grad():
                for b, k in slots:
                    if b in blocks:
                        take((b, k), self._layouts[b].parts[k].of(gradient))

        def view(slots: Sequence[Slot], w: Tensor, still: int | None) -> Tensor:
            return _HandOn.apply(w, leaf, partial(hand_on, slots))

        def enter(here: list[_Place]) -> dict[int, View]:
            chosen = [place for place in here if any(b in blocks for b, _ in place.slots)]
            return {place.parameter: partial(view, place.slots) for place in chosen}

        with self._viewed(enter):
            yield
