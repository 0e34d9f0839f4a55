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
from .reference.thin import Image, Matrix, Split, Thin

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
        _machine = Machine(native._require(), "cuda", lambda device: torch.cuda.current_stream(device).cuda_stream)
    return _machine


class Contents(NamedTuple):
    """λ of a block as the kernels take it."""

    kind: int  # of csrc/cuda/plan.h's Kind
    kronecker: bool
    operator: tuple[Tensor | None, Tensor | None, Tensor | None]  # P, S and A; or d
    lambdas: tuple[str, ...]  # the names of R and L, or of d


OUTSIDE = 0


def contents(block: Block) -> Contents:
    """For a block that is not outside. The operator is read without a refresh."""
    structure = block.structure
    aux, cache = structure.fishleg_aux, structure._cache
    if structure.maths is MATHS["diagonal"]:
        return Contents(3, False, (aux["d"], None, None), ("d", ""))
    kind = 2 if "A" in aux else 1
    return Contents(kind, True, (cache.get("P"), cache.get("S"), aux.get("A")), ("R", "L"))


_OURS = (MATHS["kron"], MATHS["kron-scaled"], MATHS["diagonal"])


def why_outside(block: Block, *us: Matrix, scaled: bool = True) -> str | None:
    """Why the kernels leave a block, or a product with u, to the reference's functions; None: they do not.

    ``scaled``: whether they know an outer diagonal.
    """
    maths = block.structure.maths
    if not any(maths is m for m in _OURS):
        return "its structure is not Kron or Diagonal"
    if not scaled and maths is MATHS["kron-scaled"]:
        return "the gradient of an outer diagonal"
    if any(isinstance(u, Thin | Image) for u in us):
        return "a thin gradient"
    kind = machine().kind
    for name, t in block.structure.fishleg_aux.items():
        if t.dtype != torch.float32 or t.device.type != kind or not t.is_contiguous():
            return f"λ {name!r} is not contiguous float32 on a {kind} device"
        if name in ("R", "L") and t.ndim != 2:
            return f"factor {name!r} is not dense"
    if maths is not MATHS["diagonal"] and min(block.shape) >= LARGE:
        return "its products are large"
    for part, grad in zip(block.parts, block.grads or [None] * len(block.parts), strict=True):
        for t in (part.param, grad):
            if t is None:
                continue
            if t.dtype not in TYPES or t.layout != torch.strided or t.device != block.momentum.device:
                return f"{t.dtype}, {t.layout} on {t.device}"
            if t.ndim > MOST_DIMS and not t.is_contiguous():
                return "more dimensions than the kernels follow"
    return None


class Views:
    """Where a block's gradient is: a pointer, strides over the part's shape and a type for each part, and a factor."""

    def __init__(self, block: Block, u: Matrix) -> None:
        self.held: list[Tensor] = []
        self.scale = 0
        self.pointers: list[int] = []
        self.layouts: list[tuple[tuple[int, ...], int]] = []
        if isinstance(u, Split):
            if u.scale is not None:
                self.scale = self._hold(u.scale.to(block.momentum.device, torch.float32)).data_ptr()
            for part, grad in zip(block.parts, block.grads, strict=True):
                if grad is None:
                    self.pointers.append(0)
                    self.layouts.append(((0,) * part.of(part.param).ndim, 0))
                else:
                    self.pointers.append(grad.data_ptr())
                    self.layouts.append((grad.stride(), TYPES[grad.dtype]))
            return
        assert isinstance(u, Tensor)
        whole = self._hold(u if u.dtype in TYPES else u.float())
        start, size = whole.data_ptr(), whole.element_size()
        outer, along = whole.stride()
        offset = 0
        for part in block.parts:
            shape = part.of(part.param).shape
            strides, run = [], outer if block.axis == 0 else along
            for d in range(len(shape) - 1, -1, -1):
                strides.append(outer if block.axis == 1 and d == 0 else run)
                run *= shape[d]
            self.layouts.append((tuple(reversed(strides)), TYPES[whole.dtype]))
            self.pointers.append(start + offset * size * (outer if block.axis == 0 else along))
            offset += shape.numel() // (1 if block.axis == 0 else max(shape[0], 1))

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
        self.begin()

    def _doubles(self, offset: int, count: int) -> Tensor:
        return self.workspace[offset : offset + 8 * count].view(torch.float64)

    def begin(self) -> None:
        """Forget what the last op was pointed to."""
        self.pointers, self.numbers = array("q"), array("d")
        self.held: list[Any] = []
        self.stream = machine().stream(self.device)

    def point(self, *tensors: Tensor | None) -> None:
        self.pointers.extend([0 if t is None else t.data_ptr() for t in tensors])

    def count(self, *numbers: float) -> None:
        self.numbers.extend(numbers)

    def take(self, views: Views) -> None:
        self.held.append(views)
        for pointer in views.pointers:
            self.pointers.append(pointer)
            self.pointers.append(views.scale)

    def hold(self, t: Tensor) -> Tensor:
        """Keep a temporary tensor until the op has been launched."""
        self.held.append(t)
        return t


_plans: WeakKeyDictionary[Block, dict[Any, Plan]] = WeakKeyDictionary()
MOST_PLANS = 16  # of lists that start with the same block


def plan_of(op: Op, blocks: Sequence[Block], views: Sequence[Views | None]) -> Plan:
    """The plan for blocks that lie like this, with nothing pointed to yet. A view that is None: a block outside."""
    device = blocks[0].momentum.device
    layouts = []
    for block, view in zip(blocks, views, strict=True):
        if view is None and op is not Op.REFRESH:
            layouts.append((block.name, OUTSIDE, 0, *block.shape, 1, ()))
            continue
        parts = []
        offset = 0
        for part, layout in zip(block.parts, view.layouts if view else (), strict=view is not None):
            theta = part.of(part.param)
            shape = theta.shape
            parts.append((tuple(shape), theta.stride(), layout[0], TYPES[theta.dtype], layout[1], offset))
            offset += shape.numel() // (1 if block.axis == 0 else max(shape[0], 1))
        precision = PRECISIONS[block.structure.precision]
        layouts.append((block.name, contents(block).kind, precision, *block.shape, block.axis, tuple(parts)))
    key = (op, device, tuple(layouts))
    known = _plans.setdefault(blocks[0], {})
    plan = known.get(key)
    if plan is None:
        if len(known) >= MOST_PLANS:  # a captured graph still writes to its plan's workspace
            for old in [k for k, p in known.items() if not p.captured][:1]:
                del known[old]
        compiled = machine().extension.CudaPlan(int(op), layouts, device.index or 0)
        outside = 0 if op is Op.REFRESH else sum(v is None for v in views)
        plan = known[key] = Plan(compiled, len(blocks), outside, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        plan.captured = True
    plan.begin()
    return plan
