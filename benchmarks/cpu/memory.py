"""Memory of FishLeg's passes beside that of the user's own: peaks of resident memory, on Linux.

    python -m benchmarks.cpu.memory

Each model trains in a process of its own: forward and backward passes alone, then with steps that anchor and learn λ.
What is counted is above the model, the optimizer's state and the libraries, which are there before. Memory of freed
tensors goes back to the system at once, so that a peak is what was in use.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common import models
from benchmarks.common.machine import cpu_name
from benchmarks.common.paths import RESULTS
from benchmarks.common.tables import table
from fishleg_fast import BernoulliLikelihood, CategoricalLikelihood, FishLeg, Likelihood, __version__

Case = tuple[nn.Module, Likelihood, Tensor, Tensor]


def convolutions(channels: int = 16, layers: int = 8) -> nn.Sequential:
    """As many 3×3 convolutions with ReLU, whose patches are nine times their inputs."""
    sizes = [3, *[channels] * layers]
    convs = [nn.Conv2d(i, o, 3, padding=1) for i, o in itertools.pairwise(sizes)]
    body = [m for conv in convs for m in (conv, nn.ReLU())]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


def _convolutions() -> Case:
    return convolutions(), CategoricalLikelihood(), torch.randn(32, 3, 48, 48), torch.randint(5, (32,))


def _resnet() -> Case:
    net = models.ResNet18(width=16)
    return net, CategoricalLikelihood(), torch.randn(64, 3, 32, 32), torch.randint(10, (64,))


def _gpt() -> Case:
    tokens = torch.randint(256, (16, 129))
    return models.GPT(), CategoricalLikelihood(class_dim=-1), tokens[:, :-1], tokens[:, 1:]


def _autoencoder() -> Case:
    x = torch.rand(1000, 784)
    return models.autoencoder(models.MNIST_WIDTHS), BernoulliLikelihood(), x, x


CASES: dict[str, tuple[str, Callable[[], Case]]] = {
    "convolutions": ("8 convolutions, 16 channels, 32 images of 48 × 48", _convolutions),
    "resnet": ("ResNet18, width 16, 64 images of 32 × 32", _resnet),
    "gpt": ("GPT, 4 layers of width 128, 16 × 128 tokens", _gpt),
    "autoencoder": ("MNIST autoencoder, batch 1000", _autoencoder),
}


def _status(name: str) -> float:
    """VmRSS or VmHWM of this process, in MB."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def peak_above(base: float, function: Callable[[], None]) -> float:
    """The peak of resident memory during the function, in MB above ``base``."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    function()
    return _status("VmHWM") - base


def measure(name: str) -> dict[str, float]:
    """Peaks of one model, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, likelihood, x, y = CASES[name][1]()
    optimizer = FishLeg(net, likelihood=likelihood, lr=1e-3, update_aux_every=1, anchor_every=1)

    def passes() -> None:
        optimizer.zero_grad()
        likelihood.nll(y, net(x)).backward()

    def step() -> None:
        passes()
        optimizer.step()

    step()  # what is allocated once
    optimizer.zero_grad()
    base = _status("VmRSS")
    return {"passes": peak_above(base, passes), "step": peak_above(base, step)}


def measured(name: str) -> dict[str, float]:
    """The same in a process of its own, whose allocator keeps nothing."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cpu.memory", "--case", name],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--case", choices=CASES, help="only this one, in this process, as JSON")
    args = parser.parse_args(argv)
    if args.case:
        print(json.dumps(measure(args.case)))
        return 0
    rows = []
    for name, (title, _) in CASES.items():
        found = measured(name)
        ratio = found["step"] / found["passes"]
        rows.append((title, f"{found['passes']:.0f}", f"{found['step']:.0f}", f"{ratio:.2f}"))
    text = (
        "# Memory of a step\n\nPeaks of resident memory above model, optimizer state and libraries, in MB: of forward "
        "and backward passes alone, and with a step that anchors and learns λ.\n\n"
        + table(("", "forward, backward", "with the step", "ratio"), rows)
        + f"\n\n{date.today()}, {cpu_name()}, one thread, Python {platform.python_version()}, torch "
        f"{torch.__version__}, fishleg_fast {__version__}: `python -m benchmarks.cpu.memory`\n"
    )
    (RESULTS / "memory.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
