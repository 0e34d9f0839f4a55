"""The deep autoencoder trained by several processes (DistributedDataParallel, gloo) beside one: a table of both.

    python -m benchmarks.train.train_ddp                          # two processes by torchrun, on this machine
    torchrun --nproc-per-node 2 -m benchmarks.train.train_ddp     # the same by hand; of each process its share

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
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common.arguments import positive, rate
from benchmarks.common.machine import cpu_name
from benchmarks.common.tables import number, table
from benchmarks.train.train_autoencoder import DEFAULTS, WIDTHS, autoencoder_problem
from benchmarks.train.training import batches, schedule
from fishleg_fast import FishLeg


class Sent:
    """Counts the bytes that this process hands to all-reduces."""

    def __init__(self) -> None:
        self.bytes, self._all_reduce = 0, dist.all_reduce

    def __call__(self, tensor: torch.Tensor, *args: Any, **given: Any) -> Any:
        self.bytes += tensor.nbytes
        return self._all_reduce(tensor, *args, **given)


def train(args: argparse.Namespace) -> dict[str, Any]:
    """This process's share of the training. What it came to, the same on all ranks."""
    several = dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    problem = autoencoder_problem(args.dataset)
    torch.manual_seed(args.seed)
    model = problem.make_model()
    outer = DistributedDataParallel(model) if several else model
    optimizer = FishLeg(outer, likelihood=problem.likelihood, lr=args.lr)
    schedules = schedule(optimizer, args.steps, 0)
    stream = batches(len(problem.data.train), args.batch_size, args.seed)
    sent, start = Sent(), time.perf_counter()
    dist.all_reduce = sent  # the optimizer's; DistributedDataParallel has its own
    try:
        for _ in range(args.steps):
            inputs, targets = problem.batch(next(stream).chunk(size)[rank])
            optimizer.zero_grad()
            problem.likelihood.nll(targets, outer(inputs)).backward()
            optimizer.step()
            schedules.step()
    finally:
        dist.all_reduce = sent._all_reduce
    seconds = time.perf_counter() - start
    aux = sum(t.nbytes for b in optimizer.blocks for t in b.structure.fishleg_aux.values())
    return {
        "processes": size,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "ms": 1000 * seconds / args.steps,
        "sent": sent.bytes / args.steps,
        "gradients": sum(p.nbytes for p in model.parameters()) if several else 0,
        "aux": aux,
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


def by_torchrun(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """The training by ``args.processes`` processes with a thread each."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "found.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}",
            "-m", "benchmarks.train.train_ddp", *argv, "--record", str(record),
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
    found.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(given)
    if "RANK" in os.environ:
        worker(args)
        return 0
    torch.set_num_threads(args.processes)  # as many cores for the one process as for the others together
    runs = [train(args), by_torchrun(args, given)]
    rows = [
        [str(r["processes"]), str(r["threads"]), f"{r['seconds']:.1f}", f"{r['ms']:.0f}", f"{r['gradients'] / 1e6:.2f}",
         f"{r['sent'] / 1e6:.2f}", f"{r['aux'] / 1e6:.2f}", number(r["nll"])]
        for r in runs
    ]  # fmt: skip
    widths = "-".join(map(str, WIDTHS[args.dataset]))
    print(f"\n{args.dataset}, {widths} and back, batch {args.batch_size}, {args.steps} steps, seed {args.seed};")
    print(f"{cpu_name()}, torch {torch.__version__}. MB: a step's gradients, what FishLeg averages besides, and λ.\n")
    header = ["processes", "threads each", "seconds", "ms/step", "gradients, MB", "averaged, MB", "λ, MB", "train NLL"]
    print(table(header, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
