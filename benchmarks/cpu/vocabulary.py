"""A layer as wide as a vocabulary: what max_factor_size="auto" saves, and what it costs in loss.

    python -m benchmarks.cpu.vocabulary            # steps and memory of Linear(32, 5000)
    python -m benchmarks.cpu.vocabulary --train    # a small GPT over a vocabulary of 8,000 too (some minutes)

Each setting runs in this process on one thread; memory is counted (`FishLeg.estimate`), times are of this thread.
"""

from __future__ import annotations

import argparse
import math
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import date
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import models
from benchmarks.common.arguments import positive
from benchmarks.common.machine import cpu_name
from benchmarks.common.paths import RESULTS
from benchmarks.common.tables import table
from fishleg_fast import CategoricalLikelihood, FishLeg, __version__

WORDS, WINDOW, BATCH, LR, WARMUP = 8000, 128, 16, 0.02, 20
# Until it was "auto" the default was 8192: dense for all of these.
WIDE = {'"auto"': "auto", "8192, dense": 8192}
GPT = {'"auto": diagonal': "auto", "1024: blocks": 1024, "512: blocks": 512}


def step_times(max_factor_size: Any) -> tuple[float, float, float]:
    """Seconds of the first step, of one that neither anchors nor learns, and of a later one that does both."""
    torch.manual_seed(0)
    net, likelihood = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5000)), CategoricalLikelihood()
    optimizer = FishLeg(net, likelihood=likelihood, max_factor_size=max_factor_size)
    x, y = torch.randn(64, 32), torch.randint(5000, (64,))
    times = []
    for _ in range(11):
        optimizer.zero_grad()
        likelihood.nll(y, net(x)).backward()
        start = time.thread_time()
        optimizer.step()
        times.append(time.thread_time() - start)
    return times[0], sum(times[1:10]) / 9, times[10]


def wide_rows() -> list[tuple[str, ...]]:
    """A row for each setting of the wide layer."""
    rows = []
    for name, limit in WIDE.items():
        first, ordinary, later = step_times(limit)
        state = FishLeg.estimate(nn.Linear(32, 5000), max_factor_size=limit).total("state_bytes") / 2**20
        rows.append((name, f"{1e3 * first:.0f}", f"{1e3 * ordinary:.2f}", f"{1e3 * later:.0f}", f"{state:.1f}"))
        print(rows[-1], flush=True)
    return rows


def tokens() -> Tensor:
    """Python's help texts as words and single marks, the most frequent ones by number, 0 for the rest."""
    from pydoc_data.topics import topics

    found = re.findall(r"\w+|\W", "\n".join(topics[name] for name in sorted(topics)))
    numbers = {word: k + 1 for k, (word, _) in enumerate(Counter(found).most_common(WORDS - 1))}
    return torch.tensor([numbers.get(word, 0) for word in found])


def trained(text: Tensor, max_factor_size: Any, steps: int, seed: int) -> tuple[float, float]:
    """The mean loss of the last twenty steps, and seconds a step."""
    torch.manual_seed(seed)
    net, likelihood = models.GPT(vocab=WORDS), CategoricalLikelihood(class_dim=-1)
    optimizer = FishLeg(net, likelihood=likelihood, lr=LR, max_factor_size=max_factor_size)
    rate = lambda s: min(1, (s + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * s / steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    order, losses, start = torch.Generator().manual_seed(seed), [], time.thread_time()
    for _ in range(steps):
        first = torch.randint(len(text) - WINDOW - 1, (BATCH,), generator=order)
        windows = torch.stack([text[i : i + WINDOW + 1] for i in first.tolist()])
        optimizer.zero_grad()
        loss = likelihood.nll(windows[:, 1:], net(windows[:, :-1]))
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20, (time.thread_time() - start) / steps


def gpt_rows(steps: int, seeds: Sequence[int]) -> list[tuple[str, ...]]:
    """A row for each setting of the GPT."""
    text, rows = tokens(), []
    for name, limit in GPT.items():
        runs = [trained(text, limit, steps, seed) for seed in seeds]
        losses = [loss for loss, _ in runs]
        seconds = sum(s for _, s in runs) / len(runs)
        state = FishLeg.estimate(models.GPT(vocab=WORDS), max_factor_size=limit).total("state_bytes") / 2**20
        mean = sum(losses) / len(losses)
        rows.append(
            (name, f"{mean:.3f}", ", ".join(f"{x:.3f}" for x in losses), f"{1e3 * seconds:.0f}", f"{state:.0f}")
        )
        print(rows[-1], flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--train", action="store_true", help="the GPT too")
    parser.add_argument("--steps", type=positive, default=150)
    parser.add_argument("--seeds", type=positive, default=2, help="how many")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    parts = ["# Vocabularies\n\nLinear(32, 5000), batch 64. Milliseconds of `optimizer.step()`, MB of its state."]
    header = ("max_factor_size", "first step", "step", "with anchoring and λ", "state MB")
    parts.append(table(header, wide_rows()))
    if args.train:
        parts.append(
            f"GPT of 4 layers, width 128, over {WORDS} words of Python's help texts, {BATCH} × {WINDOW} words a step, "
            f"{args.steps} steps, lr {LR}: mean loss of the last 20; CPU milliseconds a step, passes included."
        )
        header = ("max_factor_size", "loss", "of each seed", "ms", "state MB")
        parts.append(table(header, gpt_rows(args.steps, range(args.seeds))))
    command = "python -m benchmarks.cpu.vocabulary" + (" --train" if args.train else "")
    parts.append(
        f"{date.today()}, {cpu_name()}, one thread, Python {platform.python_version()}, torch {torch.__version__}, "
        f"fishleg_fast {__version__}: `{command}`\n"
    )
    text = "\n\n".join(parts)
    (RESULTS / "vocabulary.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
