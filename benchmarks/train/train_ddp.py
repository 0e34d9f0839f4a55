"""The deep autoencoder trained by several processes (gloo) beside one: a table of all ways.

    python -m benchmarks.train.train_ddp                          # two processes by torchrun, on this machine
    torchrun --nproc-per-node 2 -m benchmarks.train.train_ddp     # one way by hand; of each process its share

"ddp": DistributedDataParallel, all state on each rank; "shard_state": that, and each block's state on one rank;
"fully_shard": FSDP2, parameters and gradients shared out too.

Every process takes its share of the same batches, so that both trainings are of the same batches, but for labels drawn
for the curvature: their losses differ by no more than those of two seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common.arguments import positive, rate
from benchmarks.common.machine import cpu_name
from benchmarks.common.tables import number, table
from benchmarks.train.train_autoencoder import DEFAULTS, WIDTHS, autoencoder_problem
from benchmarks.train.training import batches, schedule
from fishleg_fast import FishLeg

WAYS = ("ddp", "shard_state", "fully_shard")


class Handed:
    """Counts the bytes that this process hands to the optimizer's collectives; the wrappers have ways of their own."""

    NAMES = ("all_reduce", "reduce", "broadcast", "all_to_all_single")

    def __init__(self) -> None:
        self.bytes = 0
        self._real = {name: getattr(dist, name) for name in self.NAMES}

    def _counted(self, name: str, *args: Any, **given: Any) -> Any:
        self.bytes += args[1 if name == "all_to_all_single" else 0].nbytes
        return self._real[name](*args, **given)

    def __enter__(self) -> Handed:
        for name in self.NAMES:
            setattr(dist, name, partial(self._counted, name))
        return self

    def __exit__(self, *error: object) -> None:
        for name, real in self._real.items():
            setattr(dist, name, real)


def wrapped(model: nn.Module, way: str) -> nn.Module:
    """The model as its way of training has it."""
    if not dist.is_initialized():
        return model
    if way != "fully_shard":
        return DistributedDataParallel(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            fully_shard(module)
    return fully_shard(model)


def most(value: float) -> float:
    """Over the processes."""
    found = torch.tensor(float(value), dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def train(args: argparse.Namespace) -> dict[str, Any]:
    """This process's share of the training. What it came to, the same on all ranks."""
    several = dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    problem = autoencoder_problem(args.dataset)
    torch.manual_seed(args.seed)
    model = problem.make_model()
    gradients = sum(p.nbytes for p in model.parameters()) if several else 0
    outer = wrapped(model, args.way)
    optimizer = FishLeg(outer, likelihood=problem.likelihood, lr=args.lr, shard_state=args.way == "shard_state")
    schedules = schedule(optimizer, args.steps, 0)
    stream = batches(len(problem.data.train), args.batch_size, args.seed)
    start = time.perf_counter()
    with Handed() as handed:
        for _ in range(args.steps):
            inputs, targets = problem.batch(next(stream).chunk(size)[rank])
            optimizer.zero_grad()
            problem.likelihood.nll(targets, outer(inputs)).backward()
            optimizer.step()
            schedules.step()
    seconds = time.perf_counter() - start
    aux = sum(t.nbytes for b in optimizer.blocks for t in b.structure.fishleg_aux.values())
    return {
        "way": args.way if several else "",
        "processes": size,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "ms": 1000 * seconds / args.steps,
        "handed": most(handed.bytes / args.steps),
        "gradients": gradients,
        "aux": most(aux),
        "nll": problem.evaluate(model, "train")["train nll"],
    }


def worker(args: argparse.Namespace) -> None:
    """One process of those that torchrun started; the first writes what it came to, or prints it."""
    dist.init_process_group("gloo")
    found = train(args)
    if dist.get_rank() == 0:
        if args.record is None:
            print(json.dumps(found))
        else:
            args.record.write_text(json.dumps(found))
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # DTensor's caches keep the group: gloo's threads would outlive Python, which then aborts now and then


def by_torchrun(args: argparse.Namespace, argv: Sequence[str], way: str) -> dict[str, Any]:
    """The training by ``args.processes`` processes with a thread each."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "found.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}",
            "-m", "benchmarks.train.train_ddp", *argv, "--record", str(record), "--way", way,
        ]  # fmt: skip
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return json.loads(record.read_text())


def parser() -> argparse.ArgumentParser:
    """The flags."""
    first, _, rest = (__doc__ or "").partition("\n")
    found = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--dataset", choices=["curves", "digits"], default="curves")
    found.add_argument("--processes", type=positive, default=2)
    found.add_argument("--steps", type=positive, default=100)
    found.add_argument("--batch-size", type=positive, default=1000, help="of all processes together")
    found.add_argument("--lr", type=rate, default=DEFAULTS["curves"].lr_fishleg)
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--way", choices=WAYS, help="of processes that torchrun starts: ddp; else all of them")
    found.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(given)
    if "RANK" in os.environ:
        args.way = args.way or "ddp"
        worker(args)
        return 0
    torch.set_num_threads(args.processes)  # as many cores for the one process as for the others together
    runs = [train(args), *(by_torchrun(args, given, way) for way in ([args.way] if args.way else WAYS))]
    rows = [
        [str(r["processes"]), r["way"], str(r["threads"]), f"{r['seconds']:.1f}", f"{r['ms']:.0f}",
         f"{r['gradients'] / 1e6:.2f}", f"{r['handed'] / 1e6:.2f}", f"{r['aux'] / 1e6:.2f}", number(r["nll"])]
        for r in runs
    ]  # fmt: skip
    widths = "-".join(map(str, WIDTHS[args.dataset]))
    print(f"\n{args.dataset}, {widths} and back, batch {args.batch_size}, {args.steps} steps, seed {args.seed};")
    print(
        f"{cpu_name()}, torch {torch.__version__}. MB, of the process that has most: a step's gradients, what FishLeg"
    )
    print("hands to collectives besides in a step, and λ.\n")
    header = ["processes", "way", "threads each", "seconds", "ms/step", "gradients", "handed over", "λ", "train NLL"]
    print(table(header, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
