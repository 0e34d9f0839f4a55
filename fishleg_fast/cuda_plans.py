"""What the CUDA kernels are told of blocks: which are theirs, how parameters and gradients lie, and plans of them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from enum import IntEnum
from types import ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import native
from .blocks import Block
from .reference.products import MATHS
from .reference.thin import Matrix, Split, Thin

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/cuda/tables.h numbers them
PRECISIONS = {"ieee": 0, "tf32x3": 1, "tf32": 2, "bf16": 3}
MOST_DIMS = 4
LARGE = 1024  # from here on in both sides torch's own products are taken to be faster: not measured yet


class Op(IntEnum):
    """As csrc/cuda/plan.h numbers them."""

    THETA = 0
    LAMBDA = 1
    QV = 2
    REFRESH = 3


class Machine(NamedTuple):
    """Where the kernels are, the type of the devices they run on, and a device's current stream."""

    extension: ModuleType
    kind: str
    stream: Callable[[torch.device], int]


_machine: Machine | None = None


def machine() -> Machine:
    """ImportError where the extension is unavailable."""
    global _machine
    if _machine is None:
        _machine = Machine(native.extension(), "cuda", lambda device: torch.cuda.current_stream(device).cuda_stream)
    return _machine


OUTSIDE = 0  # of csrc/cuda/plan.h's Kind; the others:
_KINDS = ((MATHS["kron"], 1), (MATHS["kron-scaled"], 2), (MATHS["diagonal"], 3))


class Known:
    """What the kernels are told of a block, and does not change from step to step."""

    __slots__ = ("kind", "kronecker", "layout", "offsets", "shapes", "signature", "why")

    def __init__(self, block: Block, signature: list[Any]) -> None:
        self.signature = signature
        self.why = _why_outside(block)
        self.kind = next((kind for maths, kind in _KINDS if block.structure.maths is maths), OUTSIDE)
        self.kronecker = self.kind in (1, 2)
        views = [part.of(part.param) for part in block.parts]
        self.shapes = [tuple(v.shape) for v in views]
        self.offsets = [0]
        for v in views:
            self.offsets.append(self.offsets[-1] + v.numel() // (max(v.shape[0], 1) if block.axis else 1))
        self.layout = [(tuple(v.shape), v.stride(), TYPES.get(v.dtype, 0)) for v in views]

    def operator(self, block: Block) -> tuple[int, int, int, int]:
        """P and S with their leading dimensions, or d, as they were last refreshed."""
        if not self.kronecker:
            return block.structure.fishleg_aux["d"].data_ptr(), 0, 0, 0
        cache = block.structure.cache
        P, S = cache["P"], cache["S"]
        return P.data_ptr(), max(P.stride(0), P.shape[0]), S.data_ptr(), max(S.stride(0), S.shape[0])

    def outer(self, block: Block) -> Tensor | None:
        """A."""
        return block.structure.fishleg_aux.get("A")

    @property
    def lambdas(self) -> tuple[str, ...]:
        """The names of R and L, or of d."""
        return ("R", "L") if self.kronecker else ("d",)


_known: WeakKeyDictionary[Block, Known] = WeakKeyDictionary()


def known(block: Block) -> Known:
    """Looked up; found out anew where λ's tensors, or where the parameters are, have changed."""
    signature: list[Any] = [id(t) for t in block.structure.fishleg_aux.values()]
    for part in block.parts:
        p = part.param
        signature += (p.data_ptr(), p.stride(), p.dtype)
    found = _known.get(block)
    if found is None or found.signature != signature:
        found = _known[block] = Known(block, signature)
    return found


def _why_outside(block: Block) -> str | None:
    structure, kind = block.structure, machine().kind
    if not any(structure.maths is maths for maths, _ in _KINDS):
        return "its structure is not Kron or Diagonal"
    for name, t in structure.fishleg_aux.items():
        if t.dtype != torch.float32 or t.device.type != kind or not t.is_contiguous():
            return f"λ {name!r} is not contiguous float32 on a {kind} device"
        if name in ("R", "L") and t.ndim != 2:
            return f"factor {name!r} is not dense"
    if structure.maths is not MATHS["diagonal"] and min(block.shape) >= LARGE:
        return f"both sides are at least {LARGE}: torch's products are taken to be faster"
    for p in (part.param for part in block.parts):
        if p.dtype not in TYPES or p.layout != torch.strided or p.device != block.momentum.device:
            return f"a parameter is {p.dtype}, {p.layout} on {p.device}"
        if p.ndim > MOST_DIMS and not p.is_contiguous():
            return "a parameter has more dimensions than the kernels follow"
    return None


def why_outside(facts: Known, u: Matrix | None = None, v: Matrix | None = None, learning: bool = False) -> str | None:
    """Why the kernels leave a block, or products with u and v, to the reference's functions; None: they do not.

    ``learning``: whether λ's gradient is wanted.
    """
    if facts.why is not None:
        return facts.why
    if learning and facts.kind == 2:
        return "the gradient of an outer diagonal"
    if isinstance(u, Thin) or isinstance(v, Thin):
        return "a thin gradient"
    if isinstance(u, Split):
        for grad in u.block.grads:
            if grad is not None and (grad.dtype not in TYPES or grad.layout != torch.strided):
                return f"a gradient is {grad.dtype}, {grad.layout}"
            if grad is not None and grad.ndim > MOST_DIMS and not grad.is_contiguous():
                return "a gradient has more dimensions than the kernels follow"
    return None


class Views:
    """Where a block's gradient is: a pointer, strides over the part's shape and a type for each part, and a factor."""

    __slots__ = ("held", "layouts", "pointers")

    def __init__(self, block: Block, facts: Known, u: Matrix) -> None:
        self.held: list[Tensor] = []  # temporary tensors that the pointers are of
        self.pointers: list[int] = []  # g and the factor of each part; 0: zeros, no factor
        self.layouts: list[tuple[tuple[int, ...], int]] = []
        if isinstance(u, Split):
            scale = 0
            if u.scale is not None:
                scale = self._hold(u.scale.to(block.momentum.device, torch.float32)).data_ptr()
            for grad, shape in zip(u.block.grads, facts.shapes, strict=True):
                if grad is None:
                    self.pointers += (0, 0)
                    self.layouts.append(((0,) * len(shape), 0))
                else:
                    self.pointers += (grad.data_ptr(), scale)
                    self.layouts.append((grad.stride(), TYPES[grad.dtype]))
            return
        assert isinstance(u, Tensor)
        whole = self._hold(u if u.dtype in TYPES else u.float())
        start, size, kind = whole.data_ptr(), whole.element_size(), TYPES[whole.dtype]
        outer, along = whole.stride()
        for shape, offset in zip(facts.shapes, facts.offsets, strict=False):
            strides, run = [], along if block.axis else outer
            for d in range(len(shape) - 1, -1, -1):
                strides.append(outer if block.axis and d == 0 else run)
                run *= shape[d]
            self.layouts.append((tuple(reversed(strides)), kind))
            self.pointers += (start + offset * size * (along if block.axis else outer), 0)

    def _hold(self, t: Tensor) -> Tensor:
        self.held.append(t)
        return t


class Plan:
    """One of the extension's plans with its workspace, and what it is pointed to for the op under way."""

    def __init__(self, compiled: Any, count: int, outside: int, device: torch.device) -> None:
        self.native, self.device = compiled, device
        self.workspace = torch.empty(max(compiled.workspace_bytes, 1), dtype=torch.uint8, device=device)
        self.external = self._doubles(compiled.external, 3 * outside).view(outside, 3)
        self.external_2 = self._doubles(compiled.external_2, 3 * outside).view(outside, 3)
        self.external_2.zero_()
        self.scales = self._doubles(compiled.scales, count)
        self.captured = False
        self.facts: list[Known] = []
        self.begin()

    def _doubles(self, offset: int, count: int) -> Tensor:
        return self.workspace[offset : offset + 8 * count].view(torch.float64)

    def begin(self) -> None:
        """Forget what the last op was pointed to."""
        self.pointers: list[int] = []
        self.numbers: list[float] = []
        self.held: list[Any] = []
        self.stream = machine().stream(self.device)

    def point(self, *tensors: Tensor | None) -> None:
        """Append where tensors are; 0 for None."""
        for t in tensors:
            self.pointers.append(0 if t is None else t.data_ptr())

    def take(self, views: Views) -> None:
        """Append where a gradient is."""
        self.held.append(views)
        self.pointers += views.pointers

    def hold(self, t: Tensor) -> Tensor:
        """Keep a temporary tensor until the op has been launched."""
        self.held.append(t)
        return t

    @property
    def lists(self) -> tuple[array[int], array[float]]:
        """Pointers and numbers as the extension takes them."""
        return array("q", self.pointers), array("d", self.numbers)


_plans: WeakKeyDictionary[Block, dict[Any, Plan]] = WeakKeyDictionary()
MOST_PLANS = 16  # of lists that start with the same block


def plan_of(op: Op, blocks: Sequence[Block], facts: Sequence[Known], views: Sequence[Views | None]) -> Plan:
    """The plan for blocks that lie like this, with nothing pointed to yet. A view that is None: a block outside."""
    device = blocks[0].momentum.device
    lie = [None if v is None else (b.structure.precision, *v.layouts) for b, v in zip(blocks, views, strict=True)]
    if op is Op.REFRESH:
        lie = [(b.structure.precision,) for b in blocks]
    key = (op, device, tuple(map(id, facts)), tuple(lie))
    plans = _plans.setdefault(blocks[0], {})
    plan = plans.get(key)
    if plan is None:
        if len(plans) >= MOST_PLANS:  # a captured graph still writes to its plan's workspace
            for old in [k for k, p in plans.items() if not p.captured][:1]:
                del plans[old]
        layouts = [_layout(op, b, f, v) for b, f, v in zip(blocks, facts, views, strict=True)]
        compiled = machine().extension.CudaPlan(int(op), layouts, device.index or 0)
        outside = 0 if op is Op.REFRESH else sum(v is None for v in views)
        plan = plans[key] = Plan(compiled, len(blocks), outside, device)
        plan.facts = list(facts)  # alive, so that their ids are theirs
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        plan.captured = True
    plan.begin()
    return plan


def _layout(op: Op, block: Block, facts: Known, view: Views | None) -> tuple:
    """A block as csrc/cuda/bindings.cpp takes it."""
    precision = PRECISIONS[block.structure.precision]
    if op is Op.REFRESH:
        return block.name, facts.kind, precision, *block.shape, block.axis, ()
    if view is None:
        return block.name, OUTSIDE, precision, *block.shape, block.axis, ()
    parts = [
        (shape, strides, layout[0], kind, layout[1], offset)
        for (shape, strides, kind), layout, offset in zip(facts.layout, view.layouts, facts.offsets, strict=False)
    ]
    return block.name, facts.kind, precision, *block.shape, block.axis, parts
