"""What FishLeg would take for a model, by counts: memory of λ and arithmetic of a step. Nothing is allocated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..algebra.polar import COEFFICIENTS
from .assemble import StructureChoice, build_blocks, check_choice, refuse_uninitialized
from .block import Block


@dataclass(frozen=True)
class BlockEstimate:
    """One block's share. Bytes, and floating-point operations (a multiplication and an addition are two)."""

    name: str
    shape: tuple[int, int]
    layout: dict[str, str]  # of the Kronecker factors, in words
    state_bytes: int  # momentum, λ, and the factors' moving averages: what a checkpoint holds
    learning_bytes: int  # more where λ is learned: its Adam moments
    cache_bytes: int  # P = RᵀR and S = LLᵀ, where it pays to form them
    buffer_bytes: int  # what the C++ backend makes products in, about; other backends keep less
    step_flops: int  # Q m
    polar_flops: int  # more, where normalize is "spectral"
    anchor_flops: int  # roots of the factors, and P and S of them; without the passes that the factors are of
    learning_flops: int  # an update of λ, P and S after it included; without its passes


@dataclass(frozen=True)
class Estimate:
    """Of all blocks. ``print`` it for a table."""

    blocks: tuple[BlockEstimate, ...]
    parameters: int
    parameter_bytes: int

    def total(self, name: str) -> int:
        """The sum over blocks of one of their figures."""
        return sum(int(getattr(block, name)) for block in self.blocks)

    def flops_per_step(self, anchor_every: int = 10, update_aux_every: int = 0, spectral: bool = True) -> float:
        """On average over steps; beside the forward and backward passes, which anchoring and learning take too."""
        flops: float = self.total("step_flops") + (self.total("polar_flops") if spectral else 0)
        for name, every in (("anchor_flops", anchor_every), ("learning_flops", update_aux_every)):
            flops += self.total(name) / every if every > 0 else -every * self.total(name)
        return flops

    def __str__(self) -> str:
        megabytes = lambda count: f"{count / 2**20:.1f}"
        giga = lambda count: f"{count / 1e9:.2f}"
        columns = ("state MB", "Adam MB", "P, S MB", "buffers MB", "step GF", "polar GF", "anchor GF", "λ GF")
        header = ("block", "shape", "factors", *columns)
        rows: list[tuple[str, ...]] = [
            (
                b.name, f"{b.shape[0]} × {b.shape[1]}", "; ".join(f"{k} {v}" for k, v in b.layout.items()),
                megabytes(b.state_bytes), megabytes(b.learning_bytes), megabytes(b.cache_bytes),
                megabytes(b.buffer_bytes),
                giga(b.step_flops), giga(b.polar_flops), giga(b.anchor_flops), giga(b.learning_flops),
            )
            for b in self.blocks
        ]  # fmt: skip
        sizes = [self.total(name) for name in ("state_bytes", "learning_bytes", "cache_bytes", "buffer_bytes")]
        sums = [self.total(name) for name in ("step_flops", "polar_flops", "anchor_flops", "learning_flops")]
        rows.append(
            ("all", f"{self.parameters} parameters", "", *map(megabytes, sizes), *map(giga, sums))
        )
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        aligned = [str.ljust] * 3 + [str.rjust] * (len(header) - 3)
        lines = [
            "  ".join(align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=True))
            for row in (header, *rows)
        ]
        lines.append(
            f"about {self.kept / 2**20:.0f} MB between steps, {self.kept / max(self.parameter_bytes, 1):.1f} times the "
            "parameters' bytes; where λ is learned, Adam's besides"
        )
        return "\n".join(line.rstrip() for line in lines)

    @property
    def kept(self) -> int:
        """Bytes between steps, about, beside parameters and gradients, of the C++ backend; without Adam's moments."""
        return sum(self.total(name) for name in ("state_bytes", "cache_bytes", "buffer_bytes"))


def estimate(
    model: nn.Module,
    structure: StructureChoice | Mapping[str, StructureChoice] = "kron",
    max_factor_size: int | str | None = "auto",
) -> Estimate:
    """Counts for the trainable parameters, see ``FishLeg.estimate``. TypeError, ValueError: an argument is wrong."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model should be an nn.Module but is: {model!r}")
    check_choice(structure)
    if max_factor_size not in (None, "auto") and (not isinstance(max_factor_size, int) or max_factor_size < 1):
        raise ValueError(
            f"max_factor_size should be 'auto', None or an integer of at least 1 but is: {max_factor_size!r}"
        )
    refuse_uninitialized(model)
    params = [p for p in model.parameters() if p.requires_grad]
    blocks = build_blocks(model, params, structure, max_factor_size, device=torch.device("meta"))
    size = sum(p.numel() * p.element_size() for p in params)
    return Estimate(tuple(map(estimate_of, blocks)), sum(p.numel() for p in params), size)


def estimate_of(block: Block) -> BlockEstimate:
    """One block's, which may be on the "meta" device."""
    aux, moments, (m, n) = block.structure.fishleg_aux, block.structure.new_moments(), block.shape
    layout = block.structure.layout()
    factors = [(t, n if name.startswith("R") else m) for name, t in aux.items() if name[0] in "RL"]  # and their vectors
    others = _entries(t for name, t in aux.items() if name[0] not in "RL")
    widths = [(t.numel(), t.shape[-1]) for t, _ in factors if t.ndim > 1]
    forming = sum(entries * width for entries, width in widths)  # P and S: half of a symmetric product's
    applied = 2 * sum(t.numel() * vectors for t, vectors in factors) + 2 * others
    # Of each factor's gradient: a product of the block's sides, and one with the factor.
    gradients = 2 * sum(t.numel() * vectors for t, vectors in factors) + 2 * sum(e * width for e, width in widths)
    k, l = min(m, n), max(m, n)
    size = block.dtype.itemsize
    return BlockEstimate(
        block.name, block.shape, layout,
        state_bytes=size * (m * n + _entries(aux.values()) + _entries(moments.values())),
        learning_bytes=2 * size * _entries(aux.values()),
        cache_bytes=size * sum(entries for entries, _ in widths),
        buffer_bytes=5 * size * m * n,
        step_flops=applied,
        polar_flops=len(COEFFICIENTS) * (3 * k * k * l + k**3) if k > 1 else 0,
        anchor_flops=sum(2 * entries * width // 3 for entries, width in widths) + forming,  # Cholesky's root, inverted
        learning_flops=2 * applied + gradients + forming,
    )  # fmt: skip


def _entries(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() for t in tensors)
