"""Derive the table of pinned tiles (kernels/host/configurations.py) on this machine's GPU.

    python -m benchmarks.gpu.pin_configurations [--class small] [--precision tf32]

Times whole steps with every candidate tile, as ``fishleg_fast.selfcheck.tuning.timing`` has them: the θ step of many
small layers ("small") and of a few large ones ("large"); the λ step and the θ step without normalisation for
"epilogue". Prints the fastest rows, to be pasted into the table, and the next four. A candidate that does not fit the
chip is left out; the compile tests check for spills. (``python -m fishleg_fast --tune`` tries fewer, for one machine's
own table.)
"""

from __future__ import annotations

import argparse

import torch

from fishleg_fast.backends import registry
from fishleg_fast.kernels.host.configurations import TILES
from fishleg_fast.selfcheck.tuning.search import times_of_tiles
from fishleg_fast.selfcheck.tuning.table import capability
from fishleg_fast.selfcheck.tuning.timing import candidates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--class", dest="shape", choices=sorted(TILES), help="one shape class only")
    parser.add_argument("--precision", choices=sorted(TILES["small"]), help="one precision only")
    arguments = parser.parse_args()
    device = torch.device("cuda")
    ok, reason = (
        registry.available("triton", device, torch.float32) if torch.cuda.is_available() else (False, "none here")
    )
    if not ok:
        raise SystemExit(f"the table is derived on a CUDA device that the backend runs on; {reason}")
    ops = registry.BACKENDS["triton"].ops()
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}")
    for shape in [arguments.shape] if arguments.shape else TILES:
        for precision in [arguments.precision] if arguments.precision else TILES[shape]:
            found = {}
            for tile, time in times_of_tiles(shape, precision, device, ops, candidates(precision)):
                if isinstance(time, Exception):
                    print(f"# {shape} {precision} {tuple(tile)}: {type(time).__name__}")
                else:
                    found[tile] = time
            order = sorted(found, key=found.__getitem__)
            print(
                f'"{shape}" "{precision}": {{{capability(device)}: {order[0]!r}}},'
                f"  # {found[order[0]] * 1e6:.0f} µs; pinned: {TILES[shape][precision]}"
            )
            for t in order[1:5]:
                print(f"#   {tuple(t)}: {found[t] * 1e6:.0f} µs")


if __name__ == "__main__":
    main()
