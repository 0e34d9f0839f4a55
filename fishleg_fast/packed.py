"""Q of Kron blocks by packed products (``panels``), whose sums are float32.

Operands are rounded to bfloat16 where ``precision="medium"`` asks for it, on a processor with a matrix unit; otherwise
they are float32, on one with AVX-512. P, S and what they are made of stay packed; results are matrices, or packed for
the next product. All blocks share each call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .panels import ENGINES, LEFT, MATRIX_UNITS, RIGHT, Batch, Panels, engines, padded
from .reference.products import MATHS, kron_thin_qv
from .reference.thin import Image, Matrix, Thin, dense, dot
from .structure import Version

if TYPE_CHECKING:
    from .blocks import Block


class Packed:
    """One block's λ, P and S as operands."""

    def __init__(self, block: Block, engine: str) -> None:
        self.structure, self.engine = block.structure, engine
        self.m, self.n = block.shape
        self.P = Panels(engine, LEFT, self.m, self.m)
        self.S = Panels(engine, RIGHT, self.n, self.n)
        self._versions: dict[Any, Version] = {}  # the λ that packed factors, or P and S ("PS"), are of
        self._rooms: dict[tuple[str, int], Panels] = {}

    def room(self, name: str, side: int, rows: int, columns: int) -> Panels:
        """Memory for an operand, of that name for as long as it is in use."""
        held = self._rooms.get((name, side))
        if held is None or (held.rows, held.columns) != (rows, columns):
            held = self._rooms[name, side] = Panels(self.engine, side, rows, columns)
        return held

    def factor(self, batch: Batch, name: str, side: int) -> Panels:
        """R, L, or a transpose, "R'" or "L'", of today's λ."""
        if side == RIGHT and self.engine not in MATRIX_UNITS:
            return self.factor(batch, name[0] if "'" in name else name + "'", LEFT).turned()
        factor, k = self.structure.fishleg_aux[name[0]], self.m if name[0] == "R" else self.n
        room = self.room(name, side, k, k)
        if not self._current((name, side)) and not batch.promises((id(self), (name, side))):
            batch.pack(factor.T if "'" in name else factor, room)
            self._promise(batch, (name, side))
        return room

    def _current(self, key: Any) -> bool:
        return self._versions.get(key) == self.structure.version

    def _promise(self, batch: Batch, key: Any) -> None:
        """What ``key`` names is being written to, and of today's λ once the batch is done."""
        self._versions.pop(key, None)
        version = self.structure.version
        batch.then((id(self), key), lambda: self._versions.update({key: version}))

    @property
    def stale(self) -> bool:
        """Whether P and S are of another λ than today's."""
        return not self._current("PS")

    def form(self, batch: Batch) -> None:
        """Have P = RᵀR and S = LLᵀ made."""
        batch.multiply(self.factor(batch, "R'", LEFT), self.factor(batch, "R", RIGHT), self.P, symmetric=True)
        batch.multiply(self.factor(batch, "L", LEFT), self.factor(batch, "L'", RIGHT), self.S, symmetric=True)
        self._promise(batch, "PS")

    def forget(self) -> None:
        """Free what the λ-gradients of a dense u alone take: several times the block's size."""
        self._rooms = {key: room for key, room in self._rooms.items() if "dense" not in key[0]}


def takes(block: Block) -> bool:
    """Whether the block's products are to be made here."""
    s = block.structure
    if s.operands not in ENGINES or ENGINES[s.operands] not in engines() or s.maths is not MATHS["kron"]:
        return False
    aux = s.fishleg_aux.values()
    return all(t.ndim == 2 and t.dtype == torch.float32 and t.is_contiguous() for t in aux) and min(block.shape) > 0


def packed_of(block: Block) -> Packed:
    """What the block keeps."""
    operands = block.structure.operands
    assert operands is not None
    if not isinstance(block.packed, Packed) or block.packed.engine != ENGINES[operands]:
        block.packed = Packed(block, ENGINES[operands])
    return block.packed


def matrix_unit(block: Block) -> bool:
    """Whether products are so fast that memory decides."""
    return packed_of(block).engine in MATRIX_UNITS


def room(block: Block) -> int:
    """Address for Q g of a thin g, where both passes of a step read what the first one makes; 0 where both make it."""
    return 0 if matrix_unit(block) else block.room().data_ptr()


def form(blocks: Sequence[Block]) -> None:
    """Make P = RᵀR and S = LLᵀ of today's λ where they are of another."""
    stale = [p for p in map(packed_of, blocks) if p.stale]
    if stale:
        batch = Batch(stale[0].engine)
        for p in stale:
            p.form(batch)
        batch.run()


def _room_like(x: Tensor) -> Tensor:
    """Memory for a matrix, row by row however x is laid out."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def product(blocks: Sequence[Block], us: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """Q u of each block, for a dense u (m, n), into ``outs``."""
    if not blocks:
        return
    form(blocks)
    first, second = (Batch(packed_of(blocks[0]).engine) for _ in range(2))
    for block, u, out in zip(blocks, us, outs, strict=True):
        p = packed_of(block)
        half = p.room("P u", LEFT, p.m, p.n)
        first.multiply(p.P, first.pack(u, p.room("u", RIGHT, p.m, p.n)), half)
        second.multiply(half, p.S, out)
    first.run()
    second.run()


def thin_products(blocks: Sequence[Block], gs: Sequence[Thin]) -> list[tuple[Panels, Panels]]:
    """Q g of thin gradients g = EᵀH, as panels of (E P)ᵀ (m, r) and H S (r, n)."""
    if not blocks:
        return []
    form(blocks)
    batch = Batch(packed_of(blocks[0]).engine)
    found = []
    for block, g in zip(blocks, gs, strict=True):
        p, r = packed_of(block), g.rank
        pair = p.room("P u", LEFT, p.m, r), p.room("H S", RIGHT, r, p.n)
        batch.multiply(p.P, batch.pack(g.E.T, p.room("E", RIGHT, p.m, r)), pair[0])
        batch.multiply(batch.pack(g.H, p.room("H", LEFT, r, p.n)), p.S, pair[1])
        found.append(pair)
    batch.run()
    return found


def qv(blocks: Sequence[Block], us: Sequence[Matrix]) -> list[Matrix]:
    """Q u of each block: of a thin u by its factors, whose products the λ-gradient takes too."""
    whole = [k for k, u in enumerate(us) if not isinstance(u, Thin)]
    found: dict[int, Matrix] = {k: _room_like(dense(us[k])) for k in whole}
    product([blocks[k] for k in whole], [dense(us[k]) for k in whole], [dense(found[k]) for k in whole])
    thin = {k: u for k, u in enumerate(us) if isinstance(u, Thin)}
    if thin and not matrix_unit(blocks[0]):  # to pack factors that are used twice costs more than it saves
        found |= {k: kron_thin_qv(blocks[k].structure.fishleg_aux, {}, u) for k, u in thin.items()}
    elif thin:
        found |= _thin_images(blocks, thin)
    return [found[k] for k in range(len(blocks))]


def _thin_images(blocks: Sequence[Block], thin: dict[int, Thin]) -> dict[int, Image]:
    batch = Batch(packed_of(blocks[0]).engine)
    halves, found = {}, {}
    for k, u in thin.items():
        p, r = packed_of(blocks[k]), u.rank
        REt, HL = u.E.new_empty(p.m, r), u.E.new_empty(r, p.n)
        batch.multiply(p.factor(batch, "R", LEFT), batch.pack(u.E.T, p.room("E", RIGHT, p.m, r)), REt)
        batch.multiply(batch.pack(u.H, p.room("H", LEFT, r, p.n)), p.factor(batch, "L", RIGHT), HL)
        halves[k] = REt, HL
    batch.run()
    for k, (REt, HL) in halves.items():
        p, r = packed_of(blocks[k]), HL.shape[0]
        PEt, HS = torch.empty_like(REt), torch.empty_like(HL)
        batch.multiply(p.factor(batch, "R'", LEFT), batch.pack(REt, p.room("E", RIGHT, p.m, r)), PEt)
        batch.multiply(batch.pack(HL, p.room("H", LEFT, r, p.n)), p.factor(batch, "L'", RIGHT), HS)
        found[k] = Image(PEt.T, HS, ((REt.T, HL),))
    batch.run()
    return found


Gradient = tuple[Panels, Panels]  # a λ-gradient, as the product of these


class Thins:
    """One block's thin u and v = Q u, and F v: the products that both 𝒜 and its gradient take."""

    def __init__(self, u: Thin, v: Image, fv: Matrix) -> None:
        self.u, self.v, self._fv = u, v, fv
        self._terms = (fv, v, u) if isinstance(fv, Thin) else (v, u)
        self._products = [(v.E @ t.E.T, v.H @ t.H.T) for t in self._terms]

    def dots(self) -> Tensor:
        """⟨v, F v⟩, ⟨v, v⟩ and ⟨u, v⟩: (3,)"""
        found = [torch.sum(x * y) for x, y in self._products]
        return torch.stack(found if len(found) == 3 else [dot(self.v, self._fv), *found])

    def residual(self, damping: float, scale: float) -> tuple[Tensor, Tensor]:
        """y = E P w (r, n) and z = H S wᵀ (r, m), of w = α(F+γI)v − u."""
        if isinstance(self._fv, Thin):
            y, z = torch.zeros_like(self.v.H), torch.zeros_like(self.u.E)
        else:
            fv = dense(self._fv) * scale
            y, z = self.v.E @ fv, self.v.H @ fv.T
        weights = (scale, scale * damping, -1.0)[-len(self._terms) :]
        for t, (left, right), c in zip(self._terms, self._products, weights, strict=True):
            y.addmm_(left, t.H, alpha=c)
            z.addmm_(right, t.E, alpha=c)
        return y, z


def gradients(
    blocks: Sequence[Block], us: Sequence[Matrix | Thins], ws: Sequence[Tensor | tuple[Tensor, Tensor]]
) -> list[dict[str, Gradient]]:
    """∂⟨w, Q u⟩/∂λ of each block, as ``reference.products`` has them.

    Of a dense u or, with y = E P w and z = H S wᵀ in the place of w, of thin ones.
    """
    if not blocks:
        return []
    batch = Batch(packed_of(blocks[0]).engine)
    finish = []
    for block, u, w in zip(blocks, us, ws, strict=True):
        if isinstance(u, Thins):
            assert not isinstance(w, Tensor)
            finish.append(_thin_gradient(packed_of(block), batch, u, *w))
        else:
            assert isinstance(w, Tensor)
            finish.append(_dense_gradient(packed_of(block), batch, dense(u), w))
    batch.run()
    found = [f(batch) for f in finish]
    batch.run()
    return found


def _thin_gradient(
    p: Packed, batch: Batch, thins: Thins, y: Tensor, z: Tensor
) -> Callable[[Batch], dict[str, Gradient]]:
    """dL = [H; y]ᵀ[yL; HL] and dR = [ERᵀ, zRᵀ]ᵀ[z; E]."""
    u, r = thins.u, thins.u.rank
    (ER, HL), *_ = thins.v.halves
    assert ER is not None and HL is not None
    if p.engine in MATRIX_UNITS:
        Rz, yL = y.new_empty(p.m, r), y.new_empty(r, p.n)
        batch.multiply(p.factor(batch, "R", LEFT), batch.pack(z.T, p.room("E", RIGHT, p.m, r)), Rz)
        batch.multiply(batch.pack(y, p.room("H", LEFT, r, p.n)), p.factor(batch, "L", RIGHT), yL)
    else:
        R, L = p.structure.fishleg_aux["R"], p.structure.fishleg_aux["L"]
        Rz, yL = R @ z.T, y @ L

    def finish(batch: Batch) -> dict[str, Gradient]:
        half = padded(p.engine, r)
        grads = {}
        for name, k, xs, ys in (("R", p.m, (ER, Rz.T), (z, u.E)), ("L", p.n, (u.H, y), (yL, HL))):
            left, right = p.room("d" + name, LEFT, k, half + r), p.room("d" + name, RIGHT, half + r, k)
            for after, x, other in zip((0, half), xs, ys, strict=True):
                batch.pack(x.T, left, after)
                batch.pack(other, right, after)
            grads[name] = left, right
        return grads

    return finish


def _dense_gradient(p: Packed, batch: Batch, u: Tensor, w: Tensor) -> Callable[[Batch], dict[str, Gradient]]:
    """dL = (M+Mᵀ)L and dR = R(N+Nᵀ), with M+Mᵀ = [u; Pw]ᵀ[Pw; u] and N+Nᵀ = [wS, u][u, wS]ᵀ."""
    Pw, wS = _room_like(w), _room_like(w)
    if p.stale:
        p.form(batch)
        batch.run()
    batch.multiply(p.P, batch.pack(w, p.room("u", RIGHT, p.m, p.n)), Pw)
    batch.multiply(batch.pack(w, p.room("u", LEFT, p.m, p.n)), p.S, wS)

    def finish(batch: Batch) -> dict[str, Gradient]:
        M, N = p.room("dense M", LEFT, p.n, p.n), p.room("dense N", RIGHT, p.m, p.m)
        for name, out, k, depth, xs in (("L", M, p.n, p.m, (u.T, Pw.T)), ("R", N, p.m, p.n, (wS, u))):
            half = padded(p.engine, depth)
            name = f"dense {name}"
            left, right = p.room(name, LEFT, k, half + depth), p.room(name, RIGHT, half + depth, k)
            for after, x, other in zip((0, half), xs, xs[::-1], strict=True):
                batch.pack(x, left, after)
                batch.pack(other.T, right, after)
            batch.multiply(left, right, out, symmetric=True)
        return {"R": (p.factor(batch, "R", LEFT), N), "L": (M, p.factor(batch, "L", RIGHT))}

    return finish


def forget(blocks: Sequence[Block]) -> None:
    """Free what the λ-gradients of dense u were made of."""
    for block in blocks:
        packed_of(block).forget()
