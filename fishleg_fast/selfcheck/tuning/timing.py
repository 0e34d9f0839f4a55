"""What is timed on a device: ops of a backend on lists of layers, and the θ and λ steps that tell a tile's speed."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from ...backends.protocol import LambdaOptions, Ops, ThetaOptions
from ...kernels.host.configurations import Tile
from ...model.block import Block
from ...model.gradients import GradientInPlace
from ..cases import Case, Draws, blocks_of, vectors
from ..families import CLASSLESS, FAMILIES

Shapes = Sequence[tuple[int, int]]  # (outputs, inputs and a bias)
Clock = Callable[[Callable[[], object]], float]

SIDES = [(32, 32), (64, 32), (64, 64), (128, 64), (64, 128), (128, 128), (256, 128)]
LR = 1e-6  # only time counts, and nothing should leave the range of floats
# what tells the speed of a tile of this class
TILE_LAYERS: dict[str, Shapes] = {
    "small": [(128, 129), (256, 257), (64, 577), (250, 501)] * 8,
    "large": [(3072, 769), (768, 3073), (2048, 2049), (4096, 4097)],
    "epilogue": [(256, 257), (1000, 785), (500, 1001), (768, 769)] * 2,
}
# what tells the speed of a backend in this one of families.SHAPE_CLASSES
CLASS_LAYERS: dict[str, Shapes] = {
    "small": [(64, 65), (128, 129), (256, 257), (30, 251)] * 6,
    "medium": [(1000, 785), (500, 1001), (250, 501), (768, 769)] * 2,
    "large": [(2048, 2049), (1536, 4097)],
}
TIMED = [family for family in FAMILIES if family != CLASSLESS]


def candidates(kind: str) -> list[Tile]:
    """Tiles to try for operands multiplied in ``kind``. ieee has no tensor cores and gets small ones."""
    depths = (16, 32) if kind in ("ieee", "tf32x3") else (32, 64)
    tiles = [
        Tile(*side, depth, warps, stages)
        for side, depth, warps, stages in itertools.product(SIDES, depths, (4, 8), (2, 3, 4))
    ]
    return [t for t in tiles if t.BM * t.BN <= (64 * 64 if kind == "ieee" else 256 * 128) * t.num_warps // 8]


def layers(shapes: Shapes, device: torch.device, kind: str | None = None) -> list[Block]:
    """Kron blocks of linear layers with a bias, with gradients; ``kind``: what kernels multiply them in."""
    linears = [partial(nn.Linear, n - 1, m) for m, n in shapes]
    case = Case(lambda: nn.ModuleList([make() for make in linears]))
    blocks = blocks_of(case, Draws(device), torch.float32, on_device=True)
    for block in blocks:
        block.structure.precision = kind or block.structure.precision
        block.groups = [{**group, "lr": LR, "base_lr": LR} for group in block.groups]
    return blocks


def calls(blocks: Sequence[Block], ops: Ops, capturable: bool = False) -> dict[str, Callable[[], object]]:
    """family -> one call of its op on the blocks."""
    us, fvs = ([x / 1e3 for x in vectors(blocks, Draws(blocks[0].momentum.device))] for _ in range(2))
    vs, gs = ops.qv(blocks, us), [GradientInPlace(b) for b in blocks]
    theta = ThetaOptions(nesterov=True, capturable=capturable)
    aux = LambdaOptions(damping=0.1, lr=LR, capturable=capturable)

    def refresh() -> None:
        """P and S from a λ that counts as changed."""
        for block in blocks:
            for t in block.structure.fishleg_aux.values():
                torch.autograd.graph.increment_version(t)
        ops.refresh(blocks)

    return {
        "refresh": refresh,
        "qv": lambda: ops.qv(blocks, us),
        "lambda_step": lambda: ops.lambda_step(blocks, us, vs, fvs, aux),
        "theta_step": lambda: ops.theta_step(blocks, gs, theta),
        "spectral": lambda: ops.theta_step(blocks, gs, replace(theta, normalize="spectral")),
        "plain step": lambda: ops.theta_step(blocks, gs, replace(theta, normalize=None)),
    }


def tile_call(shape: str, kind: str, device: torch.device, ops: Ops) -> Callable[[], object]:
    """What tells the speed of a tile of the class ``shape``: of "epilogue", the λ step and the unnormalised θ step."""
    found = calls(layers(TILE_LAYERS[shape], device, kind), ops, capturable=True)
    if shape != "epilogue":
        return found["theta_step"]
    return lambda: (found["plain step"](), found["lambda_step"]())


def seconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Median time of a call: on the device where there is one."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)
