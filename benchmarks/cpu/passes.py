"""What the C++ backend for CPUs does: passes over memory, and a step's host work. Beside the reference, in one process.

    python -m benchmarks.cpu.passes

Passes: θ steps and λ updates of the MNIST autoencoder at batch 100 whose matrix products are left out: both backends
find the same results of them in memory. Host: a θ step of 100 tiny layers, whose arithmetic takes no time.
Rounds take turns; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.common import models
from benchmarks.common.arguments import positive
from benchmarks.common.machine import cpu_name
from benchmarks.common.paths import RESULTS
from benchmarks.common.tables import table
from benchmarks.cpu.summary import cell, spread
from fishleg_fast import BernoulliLikelihood, FishLeg, __version__
from fishleg_fast.algebra.low_rank import LowRank
from fishleg_fast.algebra.matrix import Matrix
from fishleg_fast.algebra.structures.base import Structure
from fishleg_fast.backends import cpu, reference, registry
from fishleg_fast.backends.arithmetic import own_arithmetic
from fishleg_fast.backends.cpu import packed_products
from fishleg_fast.backends.protocol import LambdaOptions, Ops, ThetaOptions
from fishleg_fast.backends.reference import lambda_update
from fishleg_fast.model.block import Block

TIMES = RESULTS / "passes.json"
BACKENDS = ("reference", "cpp")
STEP, LEARNING = ThetaOptions(nesterov=True), LambdaOptions(damping=0.1, lr=1e-9, eps=1e-7)
TARGETS = {"passes": "1.5 times faster", "host": "100 µs"}


def ops_of(name: str) -> Ops:
    """A backend's ops."""
    return registry.choose(name, torch.device("cpu"), torch.float32)[1]


def trained(net: nn.Module, inputs: Tensor, targets: Tensor, **settings: Any) -> FishLeg:
    """An optimizer after three steps, with the gradients of a fourth."""
    likelihood = BernoulliLikelihood()
    optimizer = FishLeg(net, likelihood=likelihood, lr=1e-4, **settings)
    for step in range(4):
        optimizer.zero_grad()
        likelihood.nll(targets, net(inputs)).backward()
        if step < 3:
            optimizer.step()
    return optimizer


class _Ready:
    """In the place of a product with Q, which is in the block's scratch memory already."""

    def into(self, out: Tensor) -> None:
        """Nothing to do."""


@contextmanager
def products_left_out(loss: tuple[Tensor, Tensor, None], gradients: dict[int, dict[str, Tensor]]) -> Iterator[None]:
    """Both backends' θ and λ steps without matrix products: what they would compute stays as it was."""

    with (
        mock.patch.object(packed_products, "covers", lambda block: False),  # which multiplies inside its passes
        mock.patch.object(Structure, "low_rank_product", lambda structure, g: _Ready()),
        mock.patch.object(lambda_update, "dots", lambda *args: None),
        mock.patch.object(lambda_update, "aux_loss", lambda *args: loss),
        mock.patch.object(lambda_update, "aux_gradients", lambda block, *args: gradients[id(block)]),
    ):
        yield


def seconds(call: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def passes(rounds: int, precision: str) -> dict[str, Any]:
    """ms of the elementwise part of a θ step and of an Adam step of λ, and their ratios, of a round each."""
    inputs = torch.rand(100, models.MNIST_WIDTHS[0])
    net = models.autoencoder(models.MNIST_WIDTHS)
    optimizer = trained(net, inputs, inputs, precision=precision, update_aux_every=10)
    with torch.no_grad(), own_arithmetic(optimizer.blocks, precision):
        blocks, gs = optimizer._gather()
        us = optimizer._learner.directions(blocks, gs)
        vs = reference.qv(blocks, us)
        fvs = [torch.randn_like(b.momentum) for b in blocks]
        loss, power, _ = lambda_update.aux_loss(lambda_update.dots(us, vs, fvs), LEARNING)
        found = zip(blocks, us, vs, fvs, strict=True)
        gradients = {id(b): lambda_update.aux_gradients(b, u, v, fv, None, LEARNING) for b, u, v, fv in found}
        chosen = [(b, g) for b, g in zip(blocks, gs, strict=True) if isinstance(g, LowRank)]  # the others are tiny
        times: dict[str, list[float]] = {f"{kind} {name}": [] for kind in ("θ", "λ") for name in BACKENDS}
        with products_left_out((loss, power, None), gradients):
            for turn in range(rounds + 2):
                for name in BACKENDS if turn % 2 else BACKENDS[::-1]:
                    theta, aux = one_round(ops_of(name), chosen, blocks, us, vs, fvs)
                    if turn >= 2:
                        times[f"θ {name}"].append(theta * 1e3)
                        times[f"λ {name}"].append(aux * 1e3)
    both = {name: [sum(pair) for pair in zip(times[f"θ {name}"], times[f"λ {name}"], strict=True)] for name in BACKENDS}
    ratio = lambda a, b: spread(x / y for x, y in zip(a, b, strict=True))
    return {
        **{key: spread(values) for key, values in times.items()},
        "θ faster": ratio(times["θ reference"], times["θ cpp"]),
        "λ faster": ratio(times["λ reference"], times["λ cpp"]),
        "both faster": ratio(both["reference"], both["cpp"]),
    }


def one_round(
    ops: Ops,
    chosen: Sequence[tuple[Block, Matrix]],
    blocks: Sequence[Block],
    us: Sequence[Matrix],
    vs: Sequence[Matrix],
    fvs: Sequence[Tensor],
) -> tuple[float, float]:
    """Seconds of a θ step and of a λ step without their products."""
    some, gs = zip(*chosen, strict=True)
    for block in some:
        product, scratch = block.buffers()
        torch.nn.init.normal_(product)
        scratch.normal_()
        block.product_version = block.structure.version
    theta = seconds(lambda: ops.theta_step(some, gs, STEP))
    aux = seconds(lambda: ops.lambda_step(blocks, us, vs, fvs, LEARNING))
    return theta, aux


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "weight": lambda: nn.RMSNorm(8),
    "weight and bias": lambda: nn.LayerNorm(8),
    "weight and bias, products with Q": lambda: nn.Linear(8, 8),
}


def host(rounds: int, layer: str) -> dict[str, Any]:
    """µs of a θ step, and of a whole optimizer.step(), of 100 layers."""
    inputs = torch.randn(4, 8)
    runs = {}
    for name in BACKENDS:
        net = nn.Sequential(*(LAYERS[layer]() for _ in range(100)))
        optimizer = trained(net, inputs, torch.rand(4, 8).round(), backend=name, update_aux_every=0, anchor_every=0)
        runs[name] = optimizer
    times: dict[str, list[float]] = {f"{what} {name}": [] for name in BACKENDS for what in ("θ step", "whole step")}
    for _ in range(rounds):
        for name, optimizer in runs.items():
            with torch.no_grad():
                blocks, gs = optimizer._gather()  # of which a step lets go
                times[f"θ step {name}"].append(in_a_row(partial(optimizer._ops.theta_step, blocks, gs, STEP)))
            times[f"whole step {name}"].append(in_a_row(optimizer.step))
    return {key: spread(values) for key, values in times.items()}


def in_a_row(call: Callable[[], Any], count: int = 20) -> float:
    """µs of a call: the median of so many."""
    return 1e6 * sorted(seconds(call) for _ in range(count))[count // 2]


def text_of(record: dict[str, Any]) -> str:
    """The tables."""
    rows = [
        [precision, *(cell(r[f"{kind} {name}"]) for kind in ("θ", "λ") for name in BACKENDS),
         *(cell(r[f"{kind} faster"], "×", True) for kind in ("θ", "λ", "both"))]
        for precision, r in record["passes"].items()
    ]  # fmt: skip
    header = ["ms", "θ, reference", "θ, cpp", "λ, reference", "λ, cpp", "θ faster", "λ faster", "both faster"]
    lines = ["# Passes over memory and host work: backend=\"cpp\" beside the reference", "", *record["about"], "",
             f"## θ step and λ update without products, MNIST autoencoder, batch 100 (target: {TARGETS['passes']})",
             "", table(header, rows), "",
             f"## A step of 100 layers of 8 (target for a θ step: {TARGETS['host']})", ""]  # fmt: skip
    header = ["µs", *(f"{what}, {name}" for what in ("θ step", "whole step") for name in BACKENDS)]
    rows = [
        [layer, *(cell(r[f"{what} {name}"]) for what in ("θ step", "whole step") for name in BACKENDS)]
        for layer, r in record["host"].items()
    ]
    return "\n".join([*lines, table(header, rows), "", record["made"]]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=positive, default=40)
    parser.add_argument("--out", type=Path, default=TIMES, help="results, .json; the tables go beside it")
    args = parser.parse_args(argv)
    record: dict[str, Any] = {
        "passes": {precision: passes(args.rounds, precision) for precision in ("highest", "medium")},
        "host": {layer: host(args.rounds, layer) for layer in LAYERS},
        "about": [
            "Matrix products are left out of the former: both backends find the same results of them in memory. In",
            "medium precision λ's gradients are in bfloat16. Medians; quartiles of ratios in brackets.",
            "A θ step is the op with all blocks' gradients at hand; the whole step is optimizer.step(), which gathers",
            "them and takes their norm, without updates of λ; both of 20 in a row. Made by `make bench-passes`.",
        ],
        "made": f"{cpu_name()}, {torch.get_num_threads()} threads, {cpu.available()[1]}. python "
        f"{platform.python_version()}, torch {torch.__version__}, fishleg_fast {__version__}. "
        f"{date.today().isoformat()}: `python -m benchmarks.cpu.passes --rounds {args.rounds}`",
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    args.out.with_suffix(".md").write_text(text_of(record))
    print(text_of(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
