"""What `benchmarks/gpu.py` measures, the most important first."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gpu_checks
import gpu_models
import gpu_ops
import gpu_shapes
import gpu_steps
import torch
from gpu_document import Task, describe
from gpu_measure import Clock
from gpu_shapes import TALLEST, WIDEST_TARGET

from fishleg_fast import __version__, backends


@dataclass(frozen=True)
class Plan:
    """Sizes and patience; see ``FULL`` and ``REHEARSAL``."""

    main: tuple[str, ...]  # precisions that come first
    precisions: tuple[str, ...]
    squares: tuple[int, ...]
    lists: dict[str, list[gpu_shapes.Shape]]
    step_squares: tuple[int, ...]  # of the ops that hold the most state
    cases: dict[str, gpu_models.Case]
    check_scale: int
    copy: int  # numbers
    gemms: tuple[int, ...]
    seconds: float  # of a measurement
    train_seconds: float
    compiler: str
    patience: float  # what tasks need, relative to a full run


FULL = Plan(
    main=("highest", "high"),
    precisions=("highest", "high", "medium", "tf32x3"),
    squares=gpu_shapes.SQUARES,
    lists=gpu_shapes.LISTS,
    step_squares=(256, 1024, 4096),
    cases=gpu_models.CASES,
    check_scale=8,
    copy=1 << 28,
    gemms=(4096, 8192),
    seconds=0.12,
    train_seconds=1.5,
    compiler="inductor",
    patience=1.0,
)
REHEARSAL = Plan(
    main=("highest",),
    precisions=("highest", "high"),  # Triton's interpreter has no bfloat16 products
    squares=gpu_shapes.TINY_SQUARES,
    lists=gpu_shapes.TINY_LISTS,
    step_squares=(4,),
    cases=gpu_models.TINY,
    check_scale=1,
    copy=1 << 10,
    gemms=(8,),
    seconds=0.0,
    train_seconds=0.0,
    compiler="eager",
    patience=0.1,
)


def usable(device: torch.device) -> dict[str, tuple[bool, str]]:
    """Backend -> whether it can run on the device, and why not; a backend that breaks when asked cannot."""
    found = {}
    for name in backends.BACKENDS:
        try:
            found[name] = backends.available(name, device, torch.float32)
        except Exception as error:
            found[name] = (False, f"it broke when asked: {describe(error)}")
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """Device, driver and versions, and every backend with the reason where it cannot be used."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "missing"
    found = {
        "device": "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "fishleg_fast": __version__,
        "system": platform.platform(),
        "backends": {name: {"available": ok, "why": why} for name, (ok, why) in usable(device).items()},
    }
    if device.type != "cuda":
        return found
    properties = torch.cuda.get_device_properties(device)
    try:
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20,
        ).stdout.split("\n")[0]  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        driver = "unknown: nvidia-smi does not answer"
    return found | {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "L2": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "driver": driver,
    }


def mend_interpreter() -> None:
    """For a rehearsal: Triton 3.6's interpreter asks NumPy for int(array of one element), which 2.4 refuses."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def tasks(plan: Plan, clock: Clock, only: Sequence[str] = ()) -> list[Task]:
    """Everything, the most important first; of the backends ``only`` these, where it names any.

    Keys: kind/size or model/contestant/precision.
    """
    names = [n for n, (ok, _) in usable(clock.device).items() if ok and (n in only or not only)]
    found: dict[str, Task] = {}
    for task in _tasks(plan, clock, names):
        found.setdefault(task.key, task)
    return [Task(t.key, t.run, t.needs * plan.patience) for t in found.values()]


def _tasks(plan: Plan, clock: Clock, names: list[str]) -> Iterator[Task]:
    """The same, where a key may come again."""
    yield from _checks(plan, clock, names)
    yield Task("peak/copy", partial(gpu_ops.copy_task, clock, plan.copy))
    for precision in plan.precisions:
        yield Task(f"peak/gemm/{precision}", partial(gpu_ops.gemm_task, clock, plan.gemms, precision))
    squares = {str(d): [(d, d)] for d in plan.squares}
    small = {k: s for k, s in squares.items() if int(k) <= WIDEST_TARGET}
    large = {k: s for k, s in squares.items() if int(k) > WIDEST_TARGET}
    tall = {k: s for k, s in squares.items() if int(k) >= TALLEST} or dict(list(squares.items())[-1:])
    # the targets
    yield from _theta(plan, clock, names, "mnist", plan.main)
    for shapes in (small, tall, large):
        yield from _op(plan, clock, names, "refresh" if shapes is tall else "qv", shapes, plan.main)
    # whole steps
    yield from _train(plan, clock, names, "mnist", plan.main)
    for case in plan.cases:
        yield from _theta(plan, clock, names, case, plan.main)
        yield from _train(plan, clock, names, case, plan.main)
    # the ops on the models' blocks, then the other precisions, then squares for the other ops
    ops = ("qv", "theta_step", "lambda_step", "refresh")
    for op in ops:
        yield from _op(plan, clock, names, op, plan.lists, plan.main)
    yield from _op(plan, clock, names, "qv", squares, plan.precisions)
    yield from _op(plan, clock, names, "refresh", tall, plan.precisions)
    for case in plan.cases:
        yield from _theta(plan, clock, names, case, plan.precisions)
    for op in ops:
        some = squares if op == "refresh" else {str(d): [(d, d)] for d in plan.step_squares}
        yield from _op(plan, clock, names, op, some, plan.main)
        yield from _op(plan, clock, names, op, {**plan.lists, **some}, plan.precisions)


def _checks(plan: Plan, clock: Clock, names: list[str]) -> Iterator[Task]:
    for backend in names:
        for structure in gpu_checks.STRUCTURES:
            for precision in plan.precisions:
                run = partial(
                    gpu_checks.check_task, clock.device, backend, precision, structure, plan.check_scale
                )  # fmt: skip
                yield Task(f"check/{structure}/{backend}/{precision}", run, 10)


def _op(
    plan: Plan,
    clock: Clock,
    names: list[str],
    op: str,
    sizes: dict[str, list[gpu_shapes.Shape]],
    precisions: tuple[str, ...],
) -> Iterator[Task]:
    """An op at every size: all backends, then their opponents."""
    for size, shapes in sizes.items():
        for precision in precisions:
            for backend in names:
                if backend != "reference" or gpu_shapes.REFERENCE[precision] == precision:
                    run = partial(gpu_ops.backend_task, clock, op, shapes, backend, precision)
                    yield Task(f"{op}/{size}/{backend}/{precision}", run, 5)
            if gpu_shapes.COMPILED[precision] != precision:
                continue
            if op == "refresh" and len(shapes) == 1:
                run = partial(gpu_ops.mm_task, clock, shapes[0], precision)
                yield Task(f"{op}/{size}/mm/{precision}", run)
            modes = {"compiled": None, "compiled-graphs": "reduce-overhead"}
            if op in ("theta_step", "lambda_step"):
                del modes["compiled-graphs"]  # compiling these takes longest
            for name, mode in modes.items():
                run = partial(gpu_ops.compiled_task, clock, op, shapes, precision, mode, plan.compiler)
                yield Task(f"{op}/{size}/{name}/{precision}", run, 20 if len(shapes) > 1 else 8)


def _contestants(names: list[str], precisions: tuple[str, ...], published: bool) -> Iterator[tuple[str, str]]:
    """(contestant, precision); AdamW has no product and so no precision, and the published way Linears only."""
    yield "adamw", "highest"
    for precision in precisions:
        for name in (*names, *["published"] * published):
            if name not in ("reference", "published") or gpu_shapes.REFERENCE[precision] == precision:
                yield name, precision


def _able(clock: Clock, names: list[str], case: str) -> list[str]:
    """The backends that can step the model in time: interpreted kernels take a minute and more for the larger ones."""
    return names if clock.device.type == "cuda" or case == "mnist" else ["reference"] * ("reference" in names)


def _theta(plan: Plan, clock: Clock, names: list[str], case: str, precisions: tuple[str, ...]) -> Iterator[Task]:
    for name, precision in _contestants(_able(clock, names, case), precisions, plan.cases[case].published):
        run = partial(gpu_steps.theta_task, clock, plan.cases[case], name, precision)
        yield Task(f"theta/{case}/{name}/{precision}", run, 8)


def _train(plan: Plan, clock: Clock, names: list[str], case: str, precisions: tuple[str, ...]) -> Iterator[Task]:
    for name, precision in _contestants(_able(clock, names, case), precisions, plan.cases[case].published):
        run = partial(gpu_steps.train_task, clock, plan.cases[case], name, precision, plan.train_seconds)
        yield Task(f"train/{case}/{name}/{precision}", run, 15)
