"""Whether the time of a step depends on the values: denormal numbers beside clean ones, in one process.

    python -m benchmarks.cpu.denormals

Each case makes the same model twice, once with numbers that a processor without flush-to-zero takes a hundred cycles
for. Timed is `optimizer.step()` alone, anchoring and learning of λ included; the passes before it are the user's.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date

import torch
from torch import Tensor, nn

from benchmarks.common.arguments import positive
from benchmarks.common.machine import cpu_name
from benchmarks.common.models import autoencoder
from benchmarks.common.paths import RESULTS
from benchmarks.common.tables import table
from fishleg_fast import BernoulliLikelihood, CategoricalLikelihood, FishLeg, Likelihood, __version__

TINY = 1e-40
Case = tuple[nn.Module, Likelihood, Tensor, Tensor]


def confident_classifier(clean: bool) -> Case:
    """Logits some ninety apart, so that probabilities are denormal."""
    net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 1000))
    with torch.no_grad():
        net[2].bias.copy_(torch.linspace(0, 1 if clean else -100, 1000))
    return net, CategoricalLikelihood(), torch.randn(64, 64), torch.zeros(64, dtype=torch.long)


def dead_units(clean: bool) -> Case:
    """Nine of ten hidden units never fire, and their weights' momentum fades."""
    net = nn.Sequential(nn.Linear(256, 500), nn.ReLU(), nn.Linear(500, 256))
    if not clean:
        with torch.no_grad():
            net[0].bias[50:] = -1e4
    x = torch.rand(100, 256)
    return net, BernoulliLikelihood(), x, x


def tiny_pixels(clean: bool) -> Case:
    """An autoencoder of images whose dark pixels are not quite zero."""
    x = torch.rand(100, 784)
    x[:, ::2] = 0.5 if clean else TINY
    return autoencoder(), BernoulliLikelihood(), x, x


CASES: dict[str, Callable[[bool], Case]] = {
    "confident classifier": confident_classifier, "dead units": dead_units, "pixels near 1e-40": tiny_pixels,
}  # fmt: skip


class Run:
    """Training of one case."""

    def __init__(self, make: Callable[[bool], Case], clean: bool) -> None:
        torch.manual_seed(0)
        self.net, self.likelihood, self.x, self.y = make(clean)
        self.optimizer = FishLeg(self.net, likelihood=self.likelihood, lr=1e-6, update_aux_every=2, anchor_every=4)
        for _ in range(8):
            self.step()
        if not clean:  # what has decayed for long
            for block in self.optimizer.blocks:
                block.momentum.copy_(torch.where(block.momentum.abs() < 1e-8, TINY, block.momentum))
        self.step()

    def step(self) -> float:
        """Seconds of one optimizer step."""
        self.optimizer.zero_grad()
        self.likelihood.nll(self.y, self.net(self.x)).backward()
        start = time.perf_counter()
        self.optimizer.step()
        return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=positive, default=15, help="of four steps each")
    parser.add_argument("--threads", type=positive, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = []
    for name, make in CASES.items():
        runs = {clean: Run(make, clean) for clean in (True, False)}
        found = [
            {clean: sum(run.step() for _ in range(4)) / 4 for clean, run in runs.items()} for _ in range(args.rounds)
        ]
        clean, tiny = (statistics.median(times[which] for times in found) for which in (True, False))
        ratio = statistics.median(times[False] / times[True] for times in found)
        rows.append((name, f"{1e3 * clean:.2f}", f"{1e3 * tiny:.2f}", f"{ratio:.2f}"))
        print(rows[-1], flush=True)
    text = (
        "# Steps with denormal numbers\n\nMilliseconds of `optimizer.step()`, the mean of four with one anchoring "
        "and two updates of λ: medians over rounds in which both take turns.\n\n"
        + table(("", "clean numbers", "denormal numbers", "ratio"), rows)
        + f"\n\n{date.today()}, {cpu_name()}, {args.threads} thread(s), Python {platform.python_version()}, torch "
        f"{torch.__version__}, fishleg_fast {__version__}: `python -m benchmarks.cpu.denormals`\n"
    )
    (RESULTS / "denormals.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
