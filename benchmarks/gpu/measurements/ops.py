"""Times of the ops on lists of `Kron` blocks: every backend at every precision, their opponents, and the floor.

Opponents: the reference backend, eager; the plain functions of `plain_ops` under torch.compile, at the precision that
torch has for the backend's (bfloat16 operands for "medium", float32 for "tf32x3").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.clock import Clock, Times
from benchmarks.gpu.measurements import plain_ops
from benchmarks.gpu.shapes import Shape
from fishleg_fast import FishLeg, GaussianLikelihood
from fishleg_fast.backends.arithmetic import own_arithmetic
from fishleg_fast.backends.protocol import LambdaOptions, ThetaOptions
from fishleg_fast.precision import precision_scope

LR, DAMPING = 1e-6, 0.1  # a tiny lr, since only time counts and nothing should leave the range of floats

# ---- the backends


def optimizer(shapes: Sequence[Shape], device: torch.device, **settings: Any) -> FishLeg:
    """A FishLeg of one Linear without bias a shape, with gradients and a random λ: no product is of zeros."""
    model = nn.Sequential(*(nn.Linear(n, m, bias=False) for m, n in shapes)).to(device)
    return filled(FishLeg(model, likelihood=GaussianLikelihood(), **isolated(settings)))


def isolated(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with which λ changes by itself at no step."""
    return dict(lr=LR, init="sgd", update_aux_every=0, anchor_every=0, thin_gradients=False) | settings


@torch.no_grad()
def filled(opt: FishLeg) -> FishLeg:
    """Random gradients, and a random λ near the identity: zeros cost a device less than other numbers."""
    for block in opt.blocks:
        block.allocate_adam()
        for t in block.structure.fishleg_aux.values():
            t.add_(torch.randn_like(t), alpha=0.3 * max(t.shape[-1], 1) ** -0.5)
        for part in block.parts:
            if part.param.grad is None:
                part.param.grad = torch.randn_like(part.param)
    return opt


class Bench:
    """One backend's ops on blocks of these shapes. A context: the optimizer's own arithmetic, and no gradients."""

    def __init__(
        self, shapes: Sequence[Shape], device: torch.device, backend: str, precision: str, capturable: bool = False
    ) -> None:
        self.opt = optimizer(shapes, device, backend=backend, precision=precision, capturable=capturable)
        self.ops = self.opt._ops
        self.theta_options = ThetaOptions(nesterov=True, capturable=capturable)
        self.lambda_options = LambdaOptions(
            damping=DAMPING, lr=LR, betas=plain_ops.AUX_BETAS, eps=plain_ops.AUX_EPS, learn_scale=False,
            capturable=capturable,
        )  # fmt: skip
        self.blocks, self.gs = self.opt._gather()
        with torch.no_grad():
            norm = sum(m * n for m, n in shapes) ** 0.5
            self.us, self.vs, self.fvs = ([torch.randn(s, device=device) / norm for s in shapes] for _ in range(3))

    def __enter__(self) -> Bench:
        with ExitStack() as stack:  # left again where the refresh raises
            stack.enter_context(torch.no_grad())
            stack.enter_context(own_arithmetic(self.opt.blocks, self.opt.settings.precision))
            self.ops.refresh(self.blocks)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def function(self, op: str) -> Callable[[], Any]:
        """One call of the op."""
        return getattr(self, op)

    def qv(self) -> Any:
        return self.ops.qv(self.blocks, self.us)

    def refresh(self) -> Any:
        """P and S from a λ that counts as changed."""
        for block in self.blocks:
            for t in block.structure.fishleg_aux.values():
                torch.autograd.graph.increment_version(t)
        self.ops.refresh(self.blocks)

    def theta_step(self) -> Any:
        return self.ops.theta_step(self.blocks, self.gs, self.theta_options)

    def lambda_step(self) -> Any:
        return self.ops.lambda_step(self.blocks, self.us, self.vs, self.fvs, self.lambda_options)


def backend_task(clock: Clock, op: str, shapes: Sequence[Shape], backend: str, precision: str) -> Times:
    """Times of a backend's op, and its launches."""
    with Bench(shapes, clock.device, backend, precision) as eager:
        fn = eager.function(op)
        if op in ("qv", "refresh"):
            return clock.both(fn, fn) | clock.launches(fn)
        if backend == "reference":  # makes tensors of host numbers, which no graph captures
            return clock.both(fn, None) | clock.launches(fn)
        with Bench(shapes, clock.device, backend, precision, capturable=True) as captured:
            return clock.both(fn, captured.function(op)) | clock.launches(fn)


# ---- the opponents


def plain(op: str, shapes: Sequence[Shape], device: torch.device, precision: str) -> tuple[Any, tuple[Any, ...]]:
    """The plain function of an op, and random arguments for it."""
    kind = torch.bfloat16 if precision == "medium" else torch.float32
    rand = lambda *shape: torch.randn(shape, device=device)
    near = lambda k: torch.eye(k, device=device) + 0.3 * rand(k, k) * k**-0.5
    norm = sum(m * n for m, n in shapes) ** 0.5
    Rs, Ls = [near(m) for m, _ in shapes], [near(n) for _, n in shapes]
    Ps, Ss = [(R.T @ R).to(kind) for R in Rs], [(L @ L.T).to(kind) for L in Ls]
    us = [rand(*s) / norm for s in shapes]
    if op == "qv":
        return plain_ops.qv, (Ps, us, Ss)
    if op == "refresh":
        return plain_ops.refresh, (Rs, Ls, Ps, Ss)
    if op == "theta_step":
        thetas = [[rand(*s)] for s in shapes]
        return plain_ops.theta_step, (
            thetas, [[u] for u in us], [torch.zeros_like(u) for u in us], Ps, Ss, torch.ones((), device=device), LR
        )  # fmt: skip
    moments = [[torch.zeros_like(x) for x in (R, R, L, L)] for R, L in zip(Rs, Ls, strict=True)]
    vs, fvs = ([rand(*s) / norm for s in shapes] for _ in range(2))
    return plain_ops.lambda_step, (
        Rs, Ls, Ps, Ss, moments, us, vs, fvs, torch.zeros((), device=device), DAMPING, LR
    )  # fmt: skip


def _leaves(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    return [t for y in x for t in _leaves(y)] if isinstance(x, (list, tuple)) else []


@contextmanager
def users_precision(precision: str) -> Iterator[None]:
    """float32 products as a user sets them: Inductor refuses the settings of single backends, which FishLeg has."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if precision == "highest" else "high")  # medium has its own operands
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def compiled_task(
    clock: Clock, op: str, shapes: Sequence[Shape], precision: str, mode: str | None, compiler: str
) -> Times:
    """Times of the compiled plain function. With mode "reduce-overhead" torch's own CUDA graphs are in the call."""
    with users_precision(precision):
        function, arguments = plain(op, shapes, clock.device, precision)
        if mode is not None:
            for t in _leaves(arguments):
                torch._dynamo.mark_static_address(t)  # else the graph copies every argument at every call
        fn = partial(plain_ops.compiled(function, mode, compiler), *arguments)
        return {"call": clock.calls(fn)} if mode is not None else clock.both(fn, fn) | clock.launches(fn)


@torch.no_grad()
def mm_task(clock: Clock, shape: Shape, precision: str) -> Times:
    """torch.mm (cuBLAS) of the products that a refresh of one block makes."""
    m, n = shape
    kind = torch.bfloat16 if precision == "medium" else torch.float32
    with precision_scope(precision):
        R, L = (torch.randn(k, k, device=clock.device).to(kind) for k in (m, n))
        P, S = torch.empty_like(R), torch.empty_like(L)

        def fn() -> None:
            torch.mm(R.T, R, out=P)
            torch.mm(L, L.T, out=S)

        return clock.both(fn, fn)


# ---- what the device can do


def copy_task(clock: Clock, numbers: int) -> Times:
    """Bytes per second of a copy, read and written."""
    x = torch.randn(numbers, device=clock.device)
    y = torch.empty_like(x)
    times = clock.calls(lambda: y.copy_(x))
    return {"call": times, "bytes/s": 8 * numbers / (times["median"] / 1000)}


def gemm_task(clock: Clock, sizes: Sequence[int], precision: str) -> Times:
    """FLOPs per second of torch.mm at the precision: the best of some sizes. tf32x3 is three TF32 products."""
    kind = torch.bfloat16 if precision == "medium" else torch.float32
    best, found = 0.0, {}
    with precision_scope("high" if precision == "tf32x3" else precision):
        for k in sizes:
            x, y = (torch.randn(k, k, device=clock.device).to(kind) for _ in range(2))
            out = torch.empty_like(x)
            found[str(k)] = clock.calls(partial(torch.mm, x, y, out=out))
            best = max(best, 2 * k**3 / (found[str(k)]["median"] / 1000))
    return {"sizes": found, "flop/s": best / 3 if precision == "tf32x3" else best}
