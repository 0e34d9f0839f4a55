"""Derive the table of pinned tiles (kernels/host/configurations.py) on this machine's GPU.

    python -m benchmarks.gpu.pin_configurations [--class small] [--precision tf32]

Times whole steps with every candidate tile: the θ step of many small layers ("small") and of a few large ones
("large"); the λ step and the θ step without normalisation for "epilogue". Prints the fastest rows, to be pasted into
the table, and the next four. A candidate that does not fit the chip is left out; the compile tests check for spills.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable

import torch
from torch import nn

from fishleg_fast.algebra.structures.kron import Kron
from fishleg_fast.backends import registry
from fishleg_fast.backends.protocol import LambdaOptions, ThetaOptions
from fishleg_fast.kernels import backend
from fishleg_fast.kernels.host import configurations
from fishleg_fast.kernels.host.configurations import TILES, Tile
from fishleg_fast.model.block import Block, Part

SIDES = [(32, 32), (64, 32), (64, 64), (128, 64), (64, 128), (128, 128), (256, 128)]
LAYERS = {
    "small": [(128, 129), (256, 257), (64, 577), (250, 501)] * 8,
    "large": [(3072, 769), (768, 3073), (2048, 2048), (4096, 4096)],
    "epilogue": [(256, 257), (1000, 785), (500, 1001), (768, 769)] * 2,
}


def candidates(precision: str) -> list[Tile]:
    """Tiles to try. ieee has no tensor cores and gets small ones."""
    depths = (16, 32) if precision in ("ieee", "tf32x3") else (32, 64)
    tiles = [
        Tile(*side, depth, warps, stages)
        for side, depth, warps, stages in itertools.product(SIDES, depths, (4, 8), (2, 3, 4))
    ]
    return [t for t in tiles if t.BM * t.BN <= (64 * 64 if precision == "ieee" else 256 * 128) * t.num_warps // 8]


def blocks_of(shapes: list[tuple[int, int]], precision: str) -> list[Block]:
    """Linear layers with a bias, with gradients, on the GPU."""
    blocks = []
    for k, (m, n) in enumerate(shapes):
        parts = [
            Part(nn.Parameter(torch.randn(m, n - 1, device="cuda"))),
            Part(nn.Parameter(torch.randn(m, device="cuda"))),
        ]
        block = Block(f"layer {k}", parts, 1, Kron(m, n, dtype=torch.float32, device="cuda"))
        block.structure.precision = precision
        block.allocate(on_device=True)
        block.groups = [{"lr": 1e-6, "beta": 0.9, "weight_decay": 0.0, "base_lr": 1e-6, "maximize": False}] * 2
        block.grads = [torch.randn_like(p.param) for p in parts]
        blocks.append(block)
    return blocks


def seconds(step: Callable[[], object], repeats: int = 20) -> float:
    """Median time of a step on the device."""
    for _ in range(3):
        step()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def steps_of(shape: str, precision: str) -> Callable[[], object]:
    """What is timed for a shape class."""
    blocks = blocks_of(LAYERS[shape], precision)
    gs = [b.matrix(b.grads) for b in blocks]
    if shape != "epilogue":
        return lambda: backend.theta_step(blocks, gs, ThetaOptions(capturable=True))
    us = [g / 1e3 for g in gs]
    vs = backend.qv(blocks, us)

    def step() -> None:
        backend.theta_step(blocks, gs, ThetaOptions(normalize=None, capturable=True))
        backend.lambda_step(blocks, us, vs, vs, LambdaOptions(damping=0.1, lr=1e-9, capturable=True))

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--class", dest="shape", choices=sorted(TILES), help="one shape class only")
    parser.add_argument("--precision", choices=sorted(TILES["small"]), help="one precision only")
    arguments = parser.parse_args()
    ok, reason = (
        registry.available("triton", torch.device("cuda"), torch.float32) if torch.cuda.is_available() else (False, "")
    )
    if not ok:
        raise SystemExit(f"the table is derived on a CUDA device that the backend runs on; {reason or 'none here'}")
    major, minor = torch.cuda.get_device_capability()
    arch = 10 * major + minor
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}")
    for shape in [arguments.shape] if arguments.shape else TILES:
        for precision in [arguments.precision] if arguments.precision else TILES[shape]:
            step, pinned, found = steps_of(shape, precision), TILES[shape][precision], {}
            # Whatever the shapes, what is timed is this row.
            before = {other: TILES[other][precision] for other in TILES}
            for candidate in candidates(precision):
                for other in TILES if shape != "epilogue" else [shape]:
                    configurations.TILES[other][precision] = {80: candidate}
                try:
                    found[candidate] = seconds(step)
                except Exception as error:  # out of shared memory, by whatever name Triton gives it
                    print(f"# {shape} {precision} {tuple(candidate)}: {type(error).__name__}")
                finally:
                    TILES.update({other: {**TILES[other], precision: rows} for other, rows in before.items()})
            order = sorted(found, key=found.__getitem__)
            print(
                f'"{shape}" "{precision}": {{{arch}: {order[0]!r}}},'
                f"  # {found[order[0]] * 1e6:.0f} µs; pinned: {pinned}"
            )
            for t in order[1:5]:
                print(f"#   {tuple(t)}: {found[t] * 1e6:.0f} µs")


if __name__ == "__main__":
    main()
