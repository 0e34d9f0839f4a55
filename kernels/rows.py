"""From blocks to rows of the table: which blocks the kernels cover, and where everything of theirs is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import triton.language as tl
from torch import Tensor

from ..blocks import Block
from ..reference.products import MATHS
from ..reference.thin import Split, Thin
from .configurations import library_product
from .shared import FIELDS, HYPERS
from .table import Columns, Memory, Workspace, columns, is_padded, padded, upload

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
KINDS = {
    "kron": "kron", "kron-scaled": "kron", "sumkron": "kron", "diagkron": "diagkron", "diagonal": "diagonal",
}  # fmt: skip
FACTORED = ("kron", "diagkron")  # kinds with products by factors
_NAMES = {id(maths): KINDS[name] for name, maths in MATHS.items() if name in KINDS}
_PLAIN = Columns(0, 1, 1, 1)
_NOWHERE = (0, 0, 0, 1, 1, 1)  # a missing tensor: address, columns, strides


def kind(block: Block) -> str | None:
    """What ``layout`` says, but None for blocks so large that torch.mm is faster."""
    found = layout(block)
    return None if found in FACTORED and library_product(*block.shape, block.structure.precision) else found


def kinds_of(blocks: Sequence[Block]) -> list[str | None]:
    """``kind`` of each; None too for blocks on another device than the first that has one."""
    found = [kind(b) for b in blocks]
    device = next((b.momentum.device for b, k in zip(blocks, found, strict=True) if k), None)
    return [k if b.momentum.device == device else None for b, k in zip(blocks, found, strict=True)]


def layout(block: Block) -> str | None:
    """Which of the values of KINDS the kernels cover the block as, None where the reference's functions do its work.

    Covered are Kron, SumKron and DiagKron (dense factors), and Diagonal, with λ in float32, over parameters of float32,
    bfloat16 or float16: a weight seen as (m, numel/m), with a bias as its last column or without; of a Diagonal also
    any parameters below each other. Two strides have to tell where a weight's columns are, as for contiguous,
    transposed and channels-last ones.
    """
    name = _NAMES.get(id(getattr(block.structure, "maths", None)))
    if name is None or any(t.dtype != torch.float32 for t in block.structure.fishleg_aux.values()):
        return None
    views = [part.of(part.param) for part in block.parts]
    if len({v.dtype for v in views}) > 1 or views[0].dtype not in DTYPES:
        return None
    if block.axis == 0:
        flat = all(columns(v, vector=True) is not None for v in views)
        return name if name == "diagonal" and flat else None
    if name in FACTORED and any(t.ndim != 2 for t in block.structure.fishleg_aux.values()):
        return None
    if len(views) > 2 or (len(views) == 2 and views[1].numel() != views[1].shape[0]):
        return None
    return name if columns(views[0]) is not None else None


def _strided(t: Tensor | None, vector: bool = False) -> tuple[Tensor | None, Columns]:
    """A gradient with strides that the kernels can follow: a copy where two do not tell."""
    if t is None:
        return None, _PLAIN
    found = columns(t, vector)
    if found is None:
        t = t.contiguous()
        found = columns(t, vector)
    assert found is not None
    return t, found


@dataclass
class Rows:
    """The rows of some blocks with gradients of one dtype and parameters of one dtype, for one launch."""

    G: torch.dtype = torch.float32
    W: torch.dtype = torch.float32
    general: bool = False
    align: int = 16
    align_x: int = 16
    ints: list[int] = field(default_factory=list)
    shapes: list[tuple[int, int, int]] = field(default_factory=list)  # (m, n, terms) of each row
    alive: list[Tensor] = field(default_factory=list)  # what the kernels read, kept until they are launched
    copied: bool = False  # whether any of that is a copy

    def __len__(self) -> int:
        return len(self.shapes)

    def constants(self) -> dict:
        """What the kernels are compiled for."""
        return {"G": DTYPES[self.G], "GENERAL": self.general, "ALIGN": self.align, "ALIGN_X": self.align_x}

    def device(self, device: torch.device) -> Tensor:
        return upload(tuple(self.ints), torch.int64, device)

    def _see(self, t: Tensor, strides: Columns, rows: int, cols: int) -> None:
        self.general |= not strides.plain and cols > 1
        row = strides.row if rows > 1 else 0
        widths = (row, cols) if t.data_ptr() % 16 == 0 else (1,)
        self.align = math.gcd(self.align, *widths)
        self.align = self.align if self.align in (16, 8, 4) else 1

    def add(
        self,
        *,
        shape: tuple[int, int],
        own: Workspace | Memory | None,
        A: Tensor | None,
        x: Tensor | None,
        v: Tensor | None,
        grads: Sequence[Tensor | None],  # the weight's and the bias's
        params: Sequence[Tensor | None],
        cols: int,  # of the weight
        scale: Tensor | None = None,
        step: Tensor | None = None,
        rates: Sequence[object] = (),
        slot: int = 0,
        slots: int = 0,
        index: int = 0,
        first: bool = True,
        vector: bool = False,
        moments: tuple[Tensor, Tensor] | None = None,  # of d
        out: Tensor | None = None,  # for the workspace's
        scratch: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        """One row."""
        m, n = shape
        ints = [m, n, padded(m), padded(n), 1 if own is None else own.terms]
        if moments is not None:
            ints += [moments[0].data_ptr(), moments[1].data_ptr(), 0, 0]
        else:
            products = () if own is None else (own.S, own.P, own.XT, own.out if out is None else out)
            ints += [t.data_ptr() for t in products] or [0] * 4
        ints += [0, 0] if A is None else [A.data_ptr(), 0 if vector else A.stride(0)]
        ints += self._momentum(x, m, n, vector)
        ints += [0, 0] if v is None else [v.data_ptr(), v.stride(0)]
        weight, where = _strided(grads[0], vector)
        ints.append(cols)
        if weight is None:
            ints += _NOWHERE
        else:
            self._see(weight, where, m, cols)
            ints += [weight.data_ptr(), cols, 0 if vector else where.row, where.inner, where.outer, where.step]
            self.alive.append(weight)
            self.copied |= weight is not grads[0]
        bias = grads[1] if len(grads) > 1 else None
        ints += [0, 0] if bias is None else [bias.data_ptr(), bias.stride(0)]
        ints.append(0 if scale is None else scale.data_ptr())
        if bias is not None:
            self.alive.append(bias)
        if not params or params[0] is None:
            ints += [0, 0, 1, 1, 1]
        else:
            where = columns(params[0], vector)
            assert where is not None
            self._see(params[0], where, m, cols)
            ints += [params[0].data_ptr(), 0 if vector else where.row, where.inner, where.outer, where.step]
        bias = params[1] if len(params) > 1 else None
        ints += [0, 0] if bias is None else [bias.data_ptr(), bias.stride(0)]
        ints.append(0 if step is None else step.data_ptr())
        pointers = [r.data_ptr() if isinstance(r, Tensor) else 0 for r in rates]
        ints += [*pointers, 0, 0][:2]
        ints += [slot, slots, index, int(first), int(own is None)]
        ints += [0, 0, 0] if scratch is None else [t.data_ptr() for t in scratch]
        assert len(ints) == FIELDS.value
        self.ints += ints
        self.shapes.append((m, n, 1 if own is None else own.terms))

    def add_middle(self, own: Memory, B: Tensor) -> None:
        """A DiagKron's row between its first product and its last: B²∘(P X), then that times S."""
        m, n = B.shape
        self.add(shape=(m, n), own=own, A=B, x=own.out[:, :n], v=None, grads=[None], params=(), cols=n)

    def _momentum(self, x: Tensor | None, m: int, n: int, vector: bool) -> list[int]:
        if x is None:
            return [0, 0, 0]
        if vector or m == 1:
            wide = n % 16 == 0 and x.data_ptr() % 16 == 0
            row, readable = 0, n
        else:
            wide = is_padded(x)
            row, readable = x.stride(0), padded(n) if wide else n
        self.align_x = self.align_x if wide else 1
        return [x.data_ptr(), row, readable]


def pieces(block: Block, g: Tensor | Thin | Split) -> tuple[list[Tensor | None], Tensor | None]:
    """One gradient a part, in the part's shape (or (m, columns)), and the device scalar that multiplies them."""
    if isinstance(g, Tensor):
        sizes = [part.of(part.param).numel() // (block.shape[0] if block.axis else 1) for part in block.parts]
        split = list(g.split(sizes, dim=block.axis))
        return [s.select(1, 0) if block.axis == 0 or (k and block.axis) else s for k, s in enumerate(split)], None
    grads = [None if t is None else t if t.layout == torch.strided else t.to_dense() for t in block.grads]
    return grads, g.scale if isinstance(g, Split) else None


def scattered(tensors: Sequence[Tensor]) -> bool:
    """Whether any tensor (m, ...) has columns that do not lie next to each other."""
    return any(t.ndim > 1 and t.shape[0] < t.numel() and not _strided(t)[1].plain for t in tensors)


def hypers(values: Sequence[Sequence[float]], device: torch.device) -> Tensor:
    """(blocks, HYPERS) float32."""
    flat = tuple(x for row in values for x in row)
    assert len(flat) == HYPERS.value * len(values)
    return upload(flat, torch.float32, device)
