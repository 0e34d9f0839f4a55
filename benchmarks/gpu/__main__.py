"""One command for a GPU: build, check against float64, run the kernels' tests, and time every op and whole steps.

    python -m benchmarks.gpu --out DIR        # under 9 minutes, with this interpreter as it is and no network
    python -m benchmarks.gpu --dry-run        # a rehearsal on the CPU with tiny shapes: none of its figures counts
    python -m benchmarks.gpu --render DIR/gpu.json   # the tables of a file, for benchmarks/results

DIR/gpu.json is written after every measurement and DIR/gpu.txt, its tables, with it. The most important comes first:
when the time is up, what is missing is named. A measurement that fails leaves its error's text. One that takes the
device down with it, or hangs, ends its process, and another process goes on after it.

Exit status: 0; 1 where a check or test failed; 2 where there is no CUDA device.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.common.arguments import comma_separated
from benchmarks.common.paths import ROOT
from benchmarks.gpu import build
from benchmarks.gpu.report.targets import failed, targets
from benchmarks.gpu.report.text import render
from benchmarks.gpu.results_file import ResultsFile, work
from benchmarks.gpu.supervisor import supervise

BUDGET = 500.0  # seconds of the whole command: what is left of nine minutes is for the interpreter and the last task
SHARES = {"build": 0.3, "test": 0.3}  # of the budget, at most
HANGS = 100.0  # seconds without a result after which a measurement counts as hung


def commit() -> str:
    """The commit, and whether files differ from it; "unknown" without git."""
    try:
        run = lambda *a: subprocess.run(["git", "-C", str(ROOT), *a], capture_output=True, text=True, timeout=20)
        head = run("rev-parse", "HEAD")
        if head.returncode:
            return "unknown"
        return head.stdout.strip() + (" with changes" if run("status", "--porcelain", "-uno").stdout.strip() else "")
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def worker(path: Path, deadline: float, dry: bool, only: Sequence[str], backends: Sequence[str]) -> int:
    """Measure in this process."""
    import torch

    from benchmarks.gpu import agenda, environment
    from benchmarks.gpu.clock import Clock

    device = torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())
    workload = agenda.REHEARSAL if dry else agenda.FULL
    if dry:
        environment.repair_interpreter()
    file = ResultsFile(path, render)
    if "environment" not in file.data:
        file.data["environment"] = environment.record(device)
        file.save()
    clock = Clock(device, workload.seconds)
    chosen = [t for t in agenda.tasks(workload, clock, backends) if not only or t.key.startswith(tuple(only))]
    return work(file, chosen, deadline, clock.healthy, clock.clear)


def measure(args: argparse.Namespace, command: str) -> int:
    """Build, test, measure; an exit status."""
    start = time.time()
    deadline = start + args.budget
    if not args.dry_run:
        import torch

        if not torch.cuda.is_available():
            print("no CUDA device: --dry-run rehearses on the CPU", file=sys.stderr)
            return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a worker is ended too
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "gpu.json"
    path.unlink(missing_ok=True)
    file = ResultsFile(path, render)
    file.data |= {
        "rehearsal": args.dry_run, "command": command, "commit": commit(), "budget": args.budget,
        "only": args.only,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    skipped = {"verdict": "not in a rehearsal" if args.dry_run else "not with --only", "failed": False}
    if args.dry_run:
        file.data["build"] = {"built": False, "why": skipped["verdict"]}
    else:
        file.data["build"] = build.build(args.out, args.budget * SHARES["build"])
        file.save()
        print(f"extension: {file.data['build'].get('why', 'built')}", flush=True)
    alone = args.dry_run or args.only
    file.data["tests"] = skipped if alone else build.test(args.out, args.budget * SHARES["test"])
    print(f"pytest -m gpu: {file.data['tests']['verdict']}", flush=True)
    file.save()
    process = [sys.executable, "-m", "benchmarks.gpu", "--out", str(args.out.resolve()), "--worker", str(deadline)]
    process += ["--dry-run"] * args.dry_run
    for flag in ("only", "backends"):
        process += [f"--{flag}", ",".join(getattr(args, flag))] if getattr(args, flag) else []
    environment = dict(os.environ)
    if args.dry_run:
        environment["TRITON_INTERPRET"] = "1"  # Triton's own CPU test mode
    supervise(process, path, deadline, environment, args.hangs)
    file = ResultsFile(path, render)
    file.data["seconds"] = round(time.time() - start, 1)
    file.data["targets"] = targets(file.data)
    file.save()
    print(path.with_suffix(".txt").read_text())
    return int(failed(file.data))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"), metavar="DIR")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"default: {BUDGET:.0f}")
    parser.add_argument("--dry-run", action="store_true", help="a rehearsal on the CPU; no figure of it counts")
    parser.add_argument("--only", type=comma_separated, default=[], help="what begins so: check,qv/512,theta")
    parser.add_argument("--backends", type=comma_separated, default=[], help="these alone: reference,triton")
    parser.add_argument("--hangs", type=float, default=HANGS, metavar="SECONDS", help=argparse.SUPPRESS)
    parser.add_argument("--render", type=Path, metavar="JSON", help="print the tables of this file, measure nothing")
    parser.add_argument("--worker", type=float, metavar="DEADLINE", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.render:
        print(render(ResultsFile(args.render).data))
        return 0
    if args.worker is not None:
        return worker(args.out / "gpu.json", args.worker, args.dry_run, args.only, args.backends)
    where = arguments.index("--out") if "--out" in arguments else None  # a folder's name says nothing
    said = arguments if where is None else arguments[:where] + arguments[where + 2 :]
    return measure(args, shlex.join(["python", "-m", "benchmarks.gpu", *said]))


if __name__ == "__main__":
    sys.exit(main())
