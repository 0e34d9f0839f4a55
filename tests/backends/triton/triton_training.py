"""Training with the Triton kernels, interpreted: test_triton.py runs this file with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fishleg_fast import CategoricalLikelihood, FishLeg
from fishleg_fast.backends import registry
from support.dense import relative

pytestmark = pytest.mark.usefixtures("interpreter_of_numpy_2_4", "poisoned")


def trained(name: str | None, structure: str | dict[str, str], count: int, **options: object) -> tuple[Tensor, FishLeg]:
    """Parameters after ``count`` steps of a small convolutional net with norms."""
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 6, 3).to(memory_format=torch.channels_last)
    net = nn.Sequential(nn.Unflatten(1, (1, 4, 5)), conv, nn.Tanh(), nn.Flatten(), nn.LayerNorm(36), nn.Linear(36, 5))
    x, y = torch.randn(24, 20), torch.randint(0, 5, (24,))
    likelihood = CategoricalLikelihood()
    opt = FishLeg(
        net, likelihood=likelihood, backend=name, structure=structure, update_aux_every=2, anchor_every=7,
        precision="highest", weight_decay=0.01, **options,
    )  # fmt: skip
    with torch.enable_grad():
        for _ in range(count):
            opt.zero_grad()
            likelihood.nll(y, opt.model(x)).backward()
            opt.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()]), opt


@pytest.mark.parametrize(
    ("structure", "options"),
    [
        ("kron", {}),
        (
            {"1": "sumkron", "5": "diagkron"},
            {"thin_gradients": False, "normalize": None, "lr": 1e-3, "capturable": True},
        ),
    ],
)
def test_trajectory(structure: str | dict[str, str], options: dict) -> None:
    """20 steps, 10 updates of λ and 3 anchorings: θ within 1e-5 of the reference's distance from the start."""
    torch.use_deterministic_algorithms(False)
    start, _ = trained("reference", structure, 0, **options)
    want, _ = trained("reference", structure, 20, **options)
    got, opt = trained("triton", structure, 20, **options)
    assert opt.backend == "triton" and opt.diagnostics()["skipped_steps"] == 0
    assert relative(got - start, want - start) <= 1e-5


@pytest.mark.parametrize(("normalize", "close"), [("rms", 1e-5), ("spectral", 1e-2)])
def test_relative_damping(normalize: str, close: float) -> None:
    """By each block's own γ: 9 steps, 4 updates of λ and 2 anchorings.

    Softmax's gradients lack a direction, where a polar factor is grown rounding, of any backend.
    """
    options = {"damping": 0.3, "damping_scale": "relative", "normalize": normalize, "thin_gradients": False}
    start, _ = trained("reference", "kron", 0, **options)
    want, _ = trained("reference", "kron", 9, **options)
    got, opt = trained("triton", "kron", 9, **options)
    assert opt.diagnostics()["skipped_steps"] == opt.diagnostics()["skipped_aux_steps"] == 0
    assert relative(got - start, want - start) <= close
    absolute, _ = trained("reference", "kron", 9, **{**options, "damping_scale": "absolute"})
    assert relative(absolute - start, want - start) >= 3 * close


def test_it_runs_on_a_cpu_only_where_it_is_named() -> None:
    assert registry.available("triton", torch.device("cpu"), torch.float32) == (True, "interpreted, for tests")
    assert trained(None, "kron", 0)[1].backend != "triton"
