"""What is measured on a GPU, the most important first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.gpu import shapes
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.environment import usable_backends
from benchmarks.gpu.measurements import checks, models, ops, steps
from benchmarks.gpu.results_file import Task
from benchmarks.gpu.shapes import TALLEST, WIDEST_TARGET


@dataclass(frozen=True)
class Workload:
    """Sizes and patience; see ``FULL`` and ``REHEARSAL``."""

    main: tuple[str, ...]  # precisions that come first
    precisions: tuple[str, ...]
    squares: tuple[int, ...]
    lists: dict[str, list[shapes.Shape]]
    step_squares: tuple[int, ...]  # of the ops that hold the most state
    cases: dict[str, models.Case]
    check_scale: int
    copy: int  # numbers
    gemms: tuple[int, ...]
    seconds: float  # of a measurement
    train_seconds: float
    compiler: str
    patience: float  # what tasks need, relative to a full run


FULL = Workload(
    main=("highest", "high"),
    precisions=("highest", "high", "medium", "tf32x3"),
    squares=shapes.SQUARES,
    lists=shapes.LISTS,
    step_squares=(256, 1024, 4096),
    cases=models.CASES,
    check_scale=8,
    copy=1 << 28,
    gemms=(4096, 8192),
    seconds=0.12,
    train_seconds=1.5,
    compiler="inductor",
    patience=1.0,
)
REHEARSAL = Workload(
    main=("highest",),
    precisions=("highest", "high"),  # Triton's interpreter has no bfloat16 products
    squares=shapes.TINY_SQUARES,
    lists=shapes.TINY_LISTS,
    step_squares=(4,),
    cases=models.TINY,
    check_scale=1,
    copy=1 << 10,
    gemms=(8,),
    seconds=0.0,
    train_seconds=0.0,
    compiler="eager",
    patience=0.1,
)


@dataclass(frozen=True)
class Agenda:
    """The measurements of a workload, on the clock's device, by the backends named."""

    workload: Workload
    clock: Clock
    names: list[str]

    def all_tasks(self) -> Iterator[Task]:
        """Everything, the most important first; a key may come again."""
        yield from self.check_tasks()
        yield Task("peak/copy", partial(ops.copy_task, self.clock, self.workload.copy))
        for precision in self.workload.precisions:
            yield Task(f"peak/gemm/{precision}", partial(ops.gemm_task, self.clock, self.workload.gemms, precision))
        squares = {str(d): [(d, d)] for d in self.workload.squares}
        small = {k: s for k, s in squares.items() if int(k) <= WIDEST_TARGET}
        large = {k: s for k, s in squares.items() if int(k) > WIDEST_TARGET}
        tall = {k: s for k, s in squares.items() if int(k) >= TALLEST} or dict(list(squares.items())[-1:])
        # the targets
        yield from self.theta_tasks("mnist", self.workload.main)
        for sizes in (small, tall, large):
            yield from self.op_tasks("refresh" if sizes is tall else "qv", sizes, self.workload.main)
        # whole steps
        yield from self.train_tasks("mnist", self.workload.main)
        for case in self.workload.cases:
            yield from self.theta_tasks(case, self.workload.main)
            yield from self.train_tasks(case, self.workload.main)
        # the ops on the models' blocks, then the other precisions, then squares for the other ops
        names_of_ops = ("qv", "theta_step", "lambda_step", "refresh")
        for op in names_of_ops:
            yield from self.op_tasks(op, self.workload.lists, self.workload.main)
        yield from self.op_tasks("qv", squares, self.workload.precisions)
        yield from self.op_tasks("refresh", tall, self.workload.precisions)
        for case in self.workload.cases:
            yield from self.theta_tasks(case, self.workload.precisions)
        for op in names_of_ops:
            some = squares if op == "refresh" else {str(d): [(d, d)] for d in self.workload.step_squares}
            yield from self.op_tasks(op, some, self.workload.main)
            yield from self.op_tasks(op, {**self.workload.lists, **some}, self.workload.precisions)

    def check_tasks(self) -> Iterator[Task]:
        for backend in self.names:
            for structure in checks.STRUCTURES:
                for precision in self.workload.precisions:
                    run = partial(
                        checks.check_task, self.clock.device, backend, precision, structure, self.workload.check_scale
                    )  # fmt: skip
                    yield Task(f"check/{structure}/{backend}/{precision}", run, 10)

    def op_tasks(self, op: str, sizes: dict[str, list[shapes.Shape]], precisions: tuple[str, ...]) -> Iterator[Task]:
        """An op at every size: all backends, then their opponents."""
        for size, blocks in sizes.items():
            for precision in precisions:
                for backend in self.names:
                    if backend != "reference" or shapes.REFERENCE[precision] == precision:
                        run = partial(ops.backend_task, self.clock, op, blocks, backend, precision)
                        yield Task(f"{op}/{size}/{backend}/{precision}", run, 5)
                if shapes.COMPILED[precision] != precision:
                    continue
                if op == "refresh" and len(blocks) == 1:
                    run = partial(ops.mm_task, self.clock, blocks[0], precision)
                    yield Task(f"{op}/{size}/mm/{precision}", run)
                modes = {"compiled": None, "compiled-graphs": "reduce-overhead"}
                if op in ("theta_step", "lambda_step"):
                    del modes["compiled-graphs"]  # compiling these takes longest
                for name, mode in modes.items():
                    run = partial(ops.compiled_task, self.clock, op, blocks, precision, mode, self.workload.compiler)
                    yield Task(f"{op}/{size}/{name}/{precision}", run, 20 if len(blocks) > 1 else 8)

    def contestants(self, case: str, precisions: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        """(contestant, precision); AdamW has no product and so no precision, and the published way Linears only."""
        yield "adamw", "highest"
        names = [*self.able(case), *["published"] * self.workload.cases[case].published]
        for precision in precisions:
            for name in names:
                if name not in ("reference", "published") or shapes.REFERENCE[precision] == precision:
                    yield name, precision

    def able(self, case: str) -> list[str]:
        """The backends that can step the model in time: interpreted kernels take minutes for the larger ones."""
        if self.clock.device.type == "cuda" or case == "mnist":
            return self.names
        return ["reference"] * ("reference" in self.names)

    def theta_tasks(self, case: str, precisions: tuple[str, ...]) -> Iterator[Task]:
        for name, precision in self.contestants(case, precisions):
            run = partial(steps.theta_task, self.clock, self.workload.cases[case], name, precision)
            yield Task(f"theta/{case}/{name}/{precision}", run, 8)

    def train_tasks(self, case: str, precisions: tuple[str, ...]) -> Iterator[Task]:
        for name, precision in self.contestants(case, precisions):
            seconds = self.workload.train_seconds
            run = partial(steps.train_task, self.clock, self.workload.cases[case], name, precision, seconds)
            yield Task(f"train/{case}/{name}/{precision}", run, 15)


def tasks(workload: Workload, clock: Clock, only: Sequence[str] = ()) -> list[Task]:
    """Everything, the most important first; of the backends ``only`` these, where it names any.

    Keys: kind/size or model/contestant/precision.
    """
    names = [n for n, (ok, _) in usable_backends(clock.device).items() if ok and (n in only or not only)]
    found: dict[str, Task] = {}
    for task in Agenda(workload, clock, names).all_tasks():
        found.setdefault(task.key, task)
    return [Task(t.key, t.run, t.needs * workload.patience) for t in found.values()]
