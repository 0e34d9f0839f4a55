"""backend="cpp" from outside: against the reference over training runs, and with memory that moves between steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fishleg_fast import CategoricalLikelihood, FishLeg
from fishleg_fast.backends import registry
from fishleg_fast.backends.cpu.state import CpuState
from fishleg_fast.backends.cpu.step_plan import StepPlan

LIKELIHOOD = CategoricalLikelihood()


class Odd(nn.Module):
    """Layers of size one, norms, convolutions, an embedding-like table and a bare parameter."""

    def __init__(self, memory_format: torch.memory_format) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=memory_format)
        self.norm = nn.BatchNorm2d(5)
        self.narrow = nn.Linear(20, 1)
        self.scale = nn.Parameter(torch.ones(()))
        self.out = nn.Linear(1, 3)
        self.wide = nn.Linear(20, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.conv(x))).flatten(1)
        return self.out(self.narrow(h)) * self.scale + self.wide(h)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.LayerNorm(40), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (12,)),
    "odd": (lambda: Odd(torch.contiguous_format), (3, 4, 4)),
    "channels last": (lambda: Odd(torch.channels_last), (3, 4, 4)),
}


def batch(shape: tuple[int, ...], step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, *shape, generator=generator).to(dtype)
    return x, torch.randint(3, (8,), generator=generator)


def run(
    backend: str,
    model: str = "mlp",
    steps: int = 20,
    dtype: torch.dtype = torch.float32,
    between: Callable[[nn.Module, int], None] = lambda net, step: None,
    **settings: object,
) -> Tensor:
    """All parameters after some steps of training."""
    make, shape = MODELS[model]
    torch.manual_seed(0)
    net = make().to(dtype)
    settings = {"update_aux_every": 3, "anchor_every": 7, "aux_eps": 1e-3, "weight_decay": 0.01, **settings}
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, backend=backend, **settings)
    assert optimizer.backend == backend
    for step in range(steps):
        x, y = batch(shape, step, dtype)
        optimizer.zero_grad()
        LIKELIHOOD.nll(y, net(x)).backward()
        between(net, step)
        optimizer.step()
    assert optimizer.diagnostics()["skipped_steps"] == 0
    return torch.cat([p.detach().double().flatten() for p in net.parameters()])


def distance(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


VARIANTS = {
    "defaults": {},
    "dense": {"thin_gradients": False},
    "no nesterov": {"nesterov": False},
    "after": {"momentum": "after"},
    "trust": {"normalize": "trust"},
    "as computed": {"normalize": None, "lr": 1e-3},
    "diagkron": {"structure": "diagkron"},
    "sumkron": {"structure": "sumkron"},
    "diagonal": {"structure": "diagonal"},
    "blocks": {"max_factor_size": 7},
    "preconditioned": {"precondition_aux": True, "learn_scale": False},
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_training_is_the_references(variant: str, model: str) -> None:
    settings = VARIANTS[variant]
    want = run("reference", model, dtype=torch.float64, **settings)
    assert distance(run("cpp", model, dtype=torch.float64, **settings), want) < 1e-9
    # In float32 both are as far from it as rounding takes them.
    far = distance(run("reference", model, **settings), want)
    assert distance(run("cpp", model, **settings), want) < 3 * far + 1e-5


def test_counters_are_float32_whatever_the_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        want = run("reference", dtype=torch.float64)
        assert distance(run("cpp", dtype=torch.float64), want) < 1e-9
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_sixteen_bits(dtype: torch.dtype) -> None:
    """Rounded to the nearest at the end of a step, as torch does: parameters agree to their last bits."""
    steps = 3  # afterwards a last bit decides about gradients
    want = run("reference", steps=steps, dtype=dtype, momentum="before")
    got = run("cpp", steps=steps, dtype=dtype)
    assert distance(got, want) < 2 * torch.finfo(dtype).eps


def freeze_some(net: nn.Module, step: int) -> None:
    """Gradients that are missing, now of a weight, now of a bias, now of a whole layer."""
    parameters = list(net.parameters())
    for k in {0: (0,), 1: (1,), 2: (2, 3)}.get(step % 4, ()):
        parameters[k].grad = None


def transpose(net: nn.Module, step: int) -> None:
    """Gradients in another layout, at every other step."""
    for p in net.parameters():
        if step % 2 and p.ndim == 2:
            p.grad = p.grad.T.contiguous().T


def strided(net: nn.Module, step: int) -> None:
    """Gradients with gaps."""
    for p in net.parameters():
        p.grad = torch.stack([p.grad, torch.full_like(p.grad, float("nan"))], dim=-1)[..., 0]


def move(net: nn.Module, step: int) -> None:
    """Parameters that get other memory, and once another layout; what was there before is spoilt."""
    for p in net.parameters():
        old, layout = p.data, (torch.clone if step != 3 or p.ndim != 2 else lambda t: t.T.contiguous().T)
        p.data = layout(old)
        old.fill_(float("nan"))


@pytest.mark.parametrize("between", [freeze_some, transpose, strided, move])
def test_memory_that_moves(between: Callable[[nn.Module, int], None]) -> None:
    want = run("reference", dtype=torch.float64, between=between)
    assert distance(run("cpp", dtype=torch.float64, between=between), want) < 1e-9


def test_groups_change() -> None:
    results = []
    for backend in ("reference", "cpp"):
        torch.manual_seed(0)
        net = mlp().double()
        rest = [p for k, p in enumerate(net.parameters()) if k not in (4, 5)]
        lr = torch.tensor(0.02)
        groups = [{"params": rest, "lr": lr, "weight_decay": 0.1}]
        optimizer = FishLeg(net, likelihood=LIKELIHOOD, params=groups, backend=backend, aux_eps=1e-3)
        for step in range(9):
            if step == 3:
                optimizer.add_param_group({"params": list(net[3].parameters()), "maximize": True, "lr": 1e-3})
            if step == 5:
                lr.mul_(0.5)
            if step == 7:
                optimizer.param_groups[1]["lr"] = 5e-3
            x, y = batch((12,), step, torch.float64)
            optimizer.zero_grad()
            LIKELIHOOD.nll(y, net(x)).backward()
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert distance(*results) < 1e-9


def test_signatures_are_the_references() -> None:
    names = ("available", "refresh", "qv", "inner", "theta_step", "lambda_step", "average_moments")
    names += ("natural_step", "start_kfac")
    ops = [registry.choose(name, torch.device("cpu"), torch.float32)[1] for name in ("reference", "cpp")]
    for name in names:
        ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in ops[::-1])
        if name != "available":  # whose reference takes anything
            assert list(ours.values()) == list(theirs.values()), name
        assert list(ours) == list(theirs)


def test_availability() -> None:
    assert registry.available("cpp", torch.device("cuda"), torch.float32) == (False, "it runs on the CPU, not on cuda")
    ok, detail = registry.available("cpp")
    assert ok and detail.startswith("C++, compiled for ")
    assert registry.choose(None, torch.device("cpu"), torch.float32)[0] == "cpp"


def test_errors_name_the_block() -> None:
    net, shape = mlp(), (12,)
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, backend="cpp")
    x, y = batch(shape, 0, torch.float32)
    LIKELIHOOD.nll(y, net(x)).backward()
    optimizer.step()
    plan = optimizer.blocks[0].kept(CpuState).plan
    assert isinstance(plan, StepPlan) and plan.blocks == optimizer.blocks
    plan.native.give(0, 0, 0, 0)
    with pytest.raises(ValueError, match="block '0': what its natural gradient is made of is missing"):
        plan.native.theta_step(torch.empty(9, dtype=torch.float64).data_ptr(), 2, "rms", 1e-3, 1)
    with pytest.raises(ValueError, match="block '0' should get 2 parameters but gets: 0"):
        plan.native.place(0, 0, 0, 0, [])
    with pytest.raises(ValueError, match="addresses but have: 1"):
        plan.native.point([1])
    with pytest.raises(IndexError):
        plan.native.give(99, 0, 0, 0)
