"""How far a gradient is from the low-rank matrix that a backward pass seemed to make it from, on a random vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import native
from ...precision import precision_scope

# ‖g z‖, ‖g z − Eᵀ(H z)‖, the norm of the products ‖Eₖ‖‖Hₖ‖, and ‖g‖² where it was found on the way
Agreement = tuple[float, float, float, float | None]


def agreements(found: Sequence[tuple[list[Tensor], Tensor, Tensor, Tensor]]) -> list[Agreement]:
    """How far gradients g, in pieces of columns, are from EᵀH, on the vector z: of (pieces, E, H, z)."""
    rows = []
    for pieces, E, H, z in found:
        if not all(t.is_contiguous() for t in (*pieces, E, H)) or not native.available().supported:
            return [agreement_by_torch(*each) for each in found]
        columns = [(g.data_ptr(), g.shape[1]) for g in pieces]
        rows.append((int(E.dtype == torch.float64), *E.shape, *(t.data_ptr() for t in (E, H, z)), columns))
    return native.extension().agreements(rows, torch.get_num_threads()) if rows else []


def agreement_by_torch(pieces: list[Tensor], E: Tensor, H: Tensor, z: Tensor) -> Agreement:
    got, start = z.new_zeros(()), 0
    with precision_scope("highest"):
        for g in pieces:
            got = got + g @ z[start : start + g.shape[1]]
            start += g.shape[1]
        want = E.T @ (H @ z)
    rows = torch.linalg.vector_norm(E, dim=1) * torch.linalg.vector_norm(H, dim=1)
    size, difference, together = (float(torch.linalg.vector_norm(t)) for t in (got, got - want, rows))
    return size, difference, together, None
