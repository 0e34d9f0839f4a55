"""What a model and the user's functions keep beside parameters and buffers, kept apart from the optimizer's passes.

Hidden states, counters, lists and dicts in attributes of modules, in closures and globals that forward, hooks, draw and
nll name, objects with attributes, random generators of the user's own, and modules outside the model: during a pass
tensors, arrays and generators among them are copies, and afterwards every place holds what it held.
"""

from __future__ import annotations

import random
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from operator import is_
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import is_array, version

MOST = 1000  # entries of a container that are looked after; of a larger one only what is added
OBJECTS = 100  # of classes that are defined elsewhere than the model's and the user's functions
# Of torch's own objects nothing is to be set back, and of some others things that threads change.
_NOT_FOLLOWED = frozenset(
    "torch fishleg_fast builtins numpy threading logging queue multiprocessing concurrent asyncio socket subprocess io "
    "weakref".split()
)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_INTERNAL = frozenset(nn.Module().__dict__) | {"fishleg_aux"}
_INERT = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, type})


def _ours(x: Any) -> bool:
    """Whether a function, an object or a class is this package's."""
    return str(getattr(x, "__module__", "")).startswith("fishleg_fast.")


def only_stock(modules: Sequence[nn.Module]) -> bool:
    """Whether all of it is torch's own code or this package's, which keeps nothing and draws by torch alone."""
    return all(
        type(module).__module__.startswith(("torch.nn.modules.", "fishleg_fast."))
        and _ours(module.__dict__.get("forward", only_stock))
        for module in modules
    ) and not list(_user_hooks(modules))


def _user_hooks(modules: Sequence[nn.Module]) -> Iterator[Any]:
    for module in modules:
        for name in _HOOKS:
            hooks = module.__dict__.get(name)
            if hooks:
                yield from (hook for hook in hooks.values() if not _ours(hook))


class KeptApart:
    """One pass's copies, and what they stand for."""

    def __init__(self, known: Mapping[int, tuple[Tensor, Tensor]], most: int) -> None:
        """``known``: tensors and what stands for them, by id; ``most``: how many numbers are copied, of tensors, arrays
        and modules outside the model. Of what is beyond that only whether it was written to can be told.
        """
        self.written = False
        self._undo: list[Callable[[], Any]] = []
        self._left = most
        self._copies: dict[int, tuple[Any, Any]] = dict(known)
        self._met: set[int] = set()
        self._homes: set[str] = set()
        self._objects = OBJECTS  # of classes from elsewhere, that may still be followed

    def hold(self, modules: Sequence[nn.Module], functions: Sequence[Any], objects: Sequence[Any] = ()) -> None:
        """Take the copies: of what the model's modules, their hooks, the user's functions and ``objects`` keep."""
        functions = [*functions, *_user_hooks(modules)]
        self._met.update(map(id, modules))
        homes = {type(module).__module__ for module in modules} | {
            str(getattr(function, "__module__", "")) for function in functions
        }
        self._homes = {home for home in homes if not home.startswith(("torch.", "fishleg_fast."))}
        for value in objects:
            self._apart(value)
        for module in modules:
            self._module(module)
        for function in functions:
            self._follow(function)

    def restore(self) -> None:
        """Every place holds again what it held."""
        for undo in reversed(self._undo):
            undo()

    def _module(self, module: nn.Module) -> None:
        if isinstance(module, torch.jit.ScriptModule):  # its attributes are not Python's
            return
        self._slots(module.__dict__, _INTERNAL)
        if type(module).__module__ in self._homes:
            self._follow(type(module).forward)

    def _outside(self, module: nn.Module) -> None:
        """A module that is none of the model's: its parameters and buffers too."""
        for part in module.modules():
            if id(part) not in self._met:
                self._met.add(id(part))
                self._module(part)
                self._slots(part._buffers)
                self._slots(part._parameters)

    def _slots(self, slots: dict[str, Any], but: frozenset[str] = frozenset()) -> None:
        before = dict(slots)
        for key in before.keys() - but if but else before:
            value = before[key]
            if type(value) not in _INERT:
                new = self._apart(value)
                if new is not value:
                    slots[key] = new
        self._undo.append(partial(_restore_mapping, slots, before))

    def _apart(self, value: Any) -> Any:
        """What stands for the value during the pass. A container stays, and so does what nobody knows to copy."""
        if type(value) in _INERT or isinstance(value, torch.optim.Optimizer):
            return value
        if id(value) in self._copies:
            return self._copies[id(value)][1]
        new = value
        if isinstance(value, Tensor):
            new = self._tensor(value)
        elif isinstance(value, nn.Module):
            self._outside(value)
        elif isinstance(value, tuple):
            items = [self._apart(x) for x in value]
            if type(value) is tuple and not all(map(is_, items, value)):
                new = tuple(items)
        elif isinstance(value, (list, dict, set, deque)):
            self._container(value)
        elif isinstance(value, (FunctionType, MethodType, BuiltinFunctionType, partial)):
            self._follow(value)
        elif is_array(value):
            new = value.copy() if self._affords(value.size) else value
        elif (state := _generator_state(value)) is not None:
            self._undo.append(state)
        elif isinstance(value, bytearray):
            if self._affords(len(value)):
                self._undo.append(partial(value.__setitem__, slice(None), bytes(value)))
        elif isinstance(value, count):
            new = _same_count(value)
        else:
            self._object(value)
        self._copies[id(value)] = value, new
        return new

    def _affords(self, numbers: int) -> bool:
        """Whether so many more may be copied."""
        if numbers > self._left:
            return False
        self._left -= numbers
        return True

    def _tensor(self, value: Tensor) -> Tensor:
        if self._affords(0 if value.is_nested else value.numel()):
            return _copied(value)
        self._undo.append(partial(self._watch, value, version(value)))
        return value

    def _watch(self, value: Tensor, before: int) -> None:
        self.written |= version(value) != before

    def _object(self, value: Any) -> None:
        """The attributes of an object; of those of classes from elsewhere only so many are followed."""
        attributes, home = _attributes(value), type(value).__module__
        if attributes is None or id(value) in self._met:
            return
        if home not in self._homes:
            if not self._objects or home.partition(".")[0] in _NOT_FOLLOWED:
                return
            self._objects -= 1
        self._met.add(id(value))
        self._slots(attributes)

    def _container(self, value: Any) -> None:
        if id(value) in self._met:
            return
        self._met.add(id(value))
        if len(value) > MOST:
            self._undo.append(partial(_shorten, value, len(value)))
        elif isinstance(value, dict):
            self._slots(value)
        else:
            before = list(value)
            if not isinstance(value, set):
                for k, x in enumerate(before):
                    new = self._apart(x)
                    if new is not x:
                        value[k] = new
            self._undo.append(partial(_restore_items, value, before))

    def _follow(self, function: Any) -> None:
        """To what a function changes: its object, closure and the globals that it names."""
        if isinstance(function, partial):
            for x in (function.func, *function.args, *function.keywords.values()):
                self._apart(x)
            return
        if _ours(function):
            return
        owner = getattr(function, "__self__", None)
        if owner is not None and not isinstance(owner, (type, ModuleType)):
            self._apart(owner)
        function = getattr(function, "__func__", function)
        if not isinstance(function, FunctionType) or id(function) in self._met:
            self._object(function)
            return
        self._met.add(id(function))
        for cell in function.__closure__ or ():
            self._cell(cell)
        if function.__module__ in self._homes:
            self._slots_named(function.__globals__, _global_names(function))

    def _cell(self, cell: CellType) -> None:
        try:
            before = cell.cell_contents
        except ValueError:  # nothing yet
            return
        new = self._apart(before)
        if new is not before:
            cell.cell_contents = new
        self._undo.append(partial(setattr, cell, "cell_contents", before))

    def _slots_named(self, slots: dict[str, Any], names: Iterable[str]) -> None:
        for name in names:
            value = slots.get(name, slots)
            if value is not slots:
                new = self._apart(value)
                if new is not value:
                    slots[name] = new
                self._undo.append(partial(slots.__setitem__, name, value))


def _global_names(function: FunctionType) -> list[str]:
    """The globals that a function names and that may change: no classes, no Python modules, no functions of others."""
    found = []
    for name in function.__code__.co_names:
        value = function.__globals__.get(name, function)
        others = isinstance(value, (type, ModuleType)) or _ours(value)
        if isinstance(value, (FunctionType, BuiltinFunctionType)):
            others |= value is function or value.__module__ != function.__module__
        if not others:
            found.append(name)
    return found


def _attributes(value: Any) -> dict[str, Any] | None:
    """Of an object itself, past what its class makes of the question; None if it has none, or is a class."""
    try:
        found = object.__getattribute__(value, "__dict__")
    except (AttributeError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def _same_count(value: count) -> count:
    """Another ``itertools.count`` that goes on from the same number; the same one where that is no whole number."""
    found = re.fullmatch(r"count\((-?\d+)(?:, (-?\d+))?\)", repr(value))  # Python 3.14 copies them no more
    return value if found is None else count(int(found[1]), int(found[2] or 1))


def _generator_state(value: Any) -> Callable[[], Any] | None:
    """What sets back a random generator of the user's own; the global ones are seen to elsewhere."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if type(value) is random.Random:
        return None if value is random._inst else partial(value.setstate, value.getstate())
    if not type(value).__module__.startswith("numpy.random"):
        return None
    if hasattr(value, "set_state"):
        whole = value is sys.modules["numpy.random"].mtrand._rand
        return None if whole else partial(value.set_state, value.get_state())
    source = getattr(value, "bit_generator", None)
    return None if source is None else partial(setattr, source, "state", source.state)


def _copied(value: Tensor) -> Tensor:
    """A copy off the graph; the tensor itself where its kind has none."""
    try:
        return value.detach().clone().requires_grad_(value.requires_grad and value.is_leaf)
    except (RuntimeError, TypeError):
        return value


def _restore_mapping(slots: dict[Any, Any], before: dict[Any, Any]) -> None:
    if [*slots] != [*before]:  # their order too
        slots.clear()
    elif all(map(is_, slots.values(), before.values())):
        return
    for key, value in before.items():
        slots[key] = value


def _restore_items(container: Any, before: list[Any]) -> None:
    if isinstance(container, set):
        if container != set(before):
            container.clear()
            container.update(before)
    elif len(container) != len(before) or not all(map(is_, container, before)):
        container.clear()
        container.extend(before)


def _shorten(container: Any, size: int) -> None:
    if isinstance(container, set):
        return
    while len(container) > size:
        container.popitem() if isinstance(container, dict) else container.pop()
