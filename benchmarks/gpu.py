"""One command for a GPU: build, check against float64, run the kernels' tests, and time every op and whole steps.

    python benchmarks/gpu.py --out DIR        # under 9 minutes, with this interpreter as it is and no network
    python benchmarks/gpu.py --dry-run        # a rehearsal on the CPU with tiny shapes: none of its figures counts
    python benchmarks/gpu.py --render DIR/gpu.json   # the tables of a file, for benchmarks/results

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

import gpu_build
import gpu_document
import gpu_report

ROOT = gpu_build.ROOT

BUDGET = 500.0  # seconds of the whole command: what is left of nine minutes is for the interpreter and the last task
SHARES = {"build": 0.3, "test": 0.3}  # of the budget, at most
HANGS = 100.0  # seconds without a result after which a measurement counts as hung
GRACE = 15.0  # seconds that the last measurement may take beyond the budget
RESTARTS = 25


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


def supervise(worker: list[str], path: Path, deadline: float, environment: dict[str, str], hangs: float) -> list[str]:
    """Run worker processes until one ends well or the time is up; what went wrong on the way.

    The measurement during which a worker died or hung gets that as its error, and the next worker goes on after it.
    """
    troubles: list[str] = []
    while len(troubles) <= RESTARTS:
        process = subprocess.Popen(worker, cwd=ROOT, env=environment, start_new_session=True)
        started, why = time.time(), ""
        before = len(gpu_document.Document(path).results)
        try:
            while process.poll() is None:
                time.sleep(0.1)
                last = max(started, path.stat().st_mtime)
                late = time.time() > deadline + GRACE
                if late or time.time() - last > hangs:
                    why = "killed when the time was up" if late else f"hung: killed after {hangs:.0f} s"
                    break
        finally:  # also where this process is told to end
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        status = process.returncode
        if status == 0:
            return troubles
        if not why:
            name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            why = "the device was lost" if status == gpu_document.SICK else f"the process died: {name}"
        document = gpu_document.Document(path)
        running = document.data.get("running")
        if running is not None:
            document.results.setdefault(running, {"error": why})
            document.data["running"] = None
        elif len(document.results) == before:
            troubles.append(f"{why}, before it measured anything")
            document.data["troubles"] = troubles
            document.save()
            return troubles
        troubles.append(f"{why}, at {running or 'the last one measured'}")
        document.data["troubles"] = troubles
        document.save()
        if time.time() > deadline:
            return troubles
    return troubles


def worker(path: Path, deadline: float, dry: bool, only: Sequence[str], backends: Sequence[str]) -> int:
    """Measure in this process."""
    sys.path.insert(0, str(ROOT))  # the checkout itself, installed or not
    import gpu_plan
    import torch
    from gpu_measure import Clock

    device = torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())
    plan = gpu_plan.REHEARSAL if dry else gpu_plan.FULL
    if dry:
        gpu_plan.mend_interpreter()
    document = gpu_document.Document(path, gpu_report.render)
    if "environment" not in document.data:
        document.data["environment"] = gpu_plan.environment(device)
        document.save()
    clock = Clock(device, plan.seconds)
    chosen = [t for t in gpu_plan.tasks(plan, clock, backends) if not only or t.key.startswith(tuple(only))]
    return gpu_document.work(document, chosen, deadline, clock.healthy, clock.clear)


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
    document = gpu_document.Document(path, gpu_report.render)
    document.data |= {
        "rehearsal": args.dry_run, "command": command, "commit": commit(), "budget": args.budget,
        "only": args.only,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    skipped = {"verdict": "not in a rehearsal" if args.dry_run else "not with --only", "failed": False}
    if args.dry_run:
        document.data["build"] = {"built": False, "why": skipped["verdict"]}
    else:
        document.data["build"] = gpu_build.build(args.out, args.budget * SHARES["build"])
        document.save()
        print(f"extension: {document.data['build'].get('why', 'built')}", flush=True)
    alone = args.dry_run or args.only
    document.data["tests"] = skipped if alone else gpu_build.test(args.out, args.budget * SHARES["test"])
    print(f"pytest -m gpu: {document.data['tests']['verdict']}", flush=True)
    document.save()
    process = [sys.executable, __file__, "--out", str(args.out.resolve()), "--worker", str(deadline)]
    process += ["--dry-run"] * args.dry_run
    for flag in ("only", "backends"):
        process += [f"--{flag}", ",".join(getattr(args, flag))] if getattr(args, flag) else []
    environment = dict(os.environ)
    if args.dry_run:
        environment["TRITON_INTERPRET"] = "1"  # Triton's own CPU test mode
    supervise(process, path, deadline, environment, args.hangs)
    document = gpu_document.Document(path, gpu_report.render)
    document.data["seconds"] = round(time.time() - start, 1)
    document.data["targets"] = gpu_report.targets(document.data)
    document.save()
    print(path.with_suffix(".txt").read_text())
    return int(gpu_report.failed(document.data))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"), metavar="DIR")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"default: {BUDGET:.0f}")
    parser.add_argument("--dry-run", action="store_true", help="a rehearsal on the CPU; no figure of it counts")
    parser.add_argument("--only", type=lambda t: t.split(","), default=[], help="what begins so: check,qv/512,theta")
    parser.add_argument("--backends", type=lambda t: t.split(","), default=[], help="these alone: reference,triton")
    parser.add_argument("--hangs", type=float, default=HANGS, metavar="SECONDS", help=argparse.SUPPRESS)
    parser.add_argument("--render", type=Path, metavar="JSON", help="print the tables of this file, measure nothing")
    parser.add_argument("--worker", type=float, metavar="DEADLINE", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.render:
        print(gpu_report.render(gpu_document.Document(args.render).data))
        return 0
    if args.worker is not None:
        return worker(args.out / "gpu.json", args.worker, args.dry_run, args.only, args.backends)
    where = arguments.index("--out") if "--out" in arguments else None  # a folder's name says nothing
    said = arguments if where is None else arguments[:where] + arguments[where + 2 :]
    return measure(args, shlex.join(["python", "benchmarks/gpu.py", *said]))


if __name__ == "__main__":
    sys.exit(main())
