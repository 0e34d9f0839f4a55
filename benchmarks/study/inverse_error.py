"""How near Q comes to the inverse of the damped Fisher matrix, by structure, before λ is learned and after.

    python -m benchmarks.study.inverse_error

A small net in float64 whose Fisher matrix is written down; Q starts from Kronecker factors, and λ is learned by Adam
along gradients on drawn labels, θ at rest. The error is ‖(F+γI)αQg − g‖/‖g‖, α the best multiple, over fresh gradients:
of all layers together, and of each layer by itself, F being its own block.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from statistics import mean

import torch
from torch import Tensor, nn

from benchmarks.common.machine import cpu_name
from benchmarks.common.tables import table
from benchmarks.study.records import versions
from fishleg_fast import CategoricalLikelihood, FishLeg

STRUCTURES, UPDATES, FRESH, GAMMA = ("kron", "diagkron", "sumkron"), (0, 300, 1000), 50, 1e-3


def explicit_fisher(net: nn.Module, x: Tensor, likelihood: CategoricalLikelihood) -> Tensor:
    """JᵀHJ over all parameters, each bias after its weight."""
    params = list(net.parameters())
    outputs = net(x)
    rows = [torch.autograd.grad(f, params, retain_graph=True) for f in outputs.reshape(-1)]
    J = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    columns = J.reshape(*outputs.shape, -1)
    H = torch.stack([likelihood.fisher_product(outputs.detach(), v) for v in columns.movedim(-1, 0)], dim=-1)
    return J.T @ H.reshape(J.shape)


def error(F: Tensor, us: Sequence[Tensor], vs: Sequence[Tensor]) -> float:
    """Mean relative residual of the best multiples."""
    found = []
    for u, v in zip(us, vs, strict=True):
        image = F @ v + GAMMA * v
        found.append(float((image * (u @ image) / (image @ image) - u).norm() / u.norm()))
    return mean(found)


def main() -> int:
    """Print the table."""
    torch.set_num_threads(1)
    rows = []
    for structure in STRUCTURES:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 10, bias=False), nn.Tanh(), nn.Linear(10, 5, bias=False)).double()
        x, likelihood = torch.randn(200, 12).double() * torch.linspace(0.2, 2, 12).double(), CategoricalLikelihood()
        optimizer = FishLeg(
            net, likelihood=likelihood, aux_loader=[x], structure=structure, aux_update="adam", anchor_every=0,
            damping=GAMMA, damping_scale="absolute", curvature_batch=None, aux_lr=1e-3, update_aux_every=10,
        )  # fmt: skip
        F, sizes = explicit_fisher(net, x, likelihood), [p.numel() for p in net.parameters()]
        done = 0
        for updates in UPDATES:
            optimizer.pretrain_aux(updates - done)
            done = updates
            with torch.no_grad():
                drawn = [optimizer._learner.drawn_gradients(optimizer.blocks) for _ in range(FRESH)]
                images = [[b.structure.Qv(g) for b, g in zip(optimizer.blocks, gs, strict=True)] for gs in drawn]
            flat = [[torch.cat([t.reshape(-1) for t in ts]) for ts in each] for each in (drawn, images)]
            whole = error(F, *flat)
            parts = []
            for k, (start, size) in enumerate(zip((0, sizes[0]), sizes, strict=True)):
                block = F[start : start + size, start : start + size]
                parts.append(error(block, *([ts[k].reshape(-1) for ts in each] for each in (drawn, images))))
            rows.append([structure, str(updates), f"{whole:.3f}", *(f"{part:.3f}" for part in parts)])
    print(table(["structure", "updates of λ", "all layers", "first layer", "second layer"], rows))
    print(f"\n{cpu_name()}, {', '.join(f'{k} {v}' for k, v in versions('fishleg').items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
