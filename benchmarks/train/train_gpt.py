"""A small GPT on the bytes of Python's help texts, trained by FishLeg and by torch's AdamW; ends in a table and a plot.

    python -m benchmarks.train.train_gpt

Ctrl-C stops it: the table and the plot then show what was reached.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import Tensor

from benchmarks.common import models
from benchmarks.train import datasets
from benchmarks.train.compare import Defaults, compare, flags, setup
from benchmarks.train.training import Problem
from fishleg_fast import CategoricalLikelihood

DEFAULTS = Defaults(steps=300, batch_size=16, lr_fishleg=2e-2, lr_adamw=1e-3, warmup=20, adamw_ratio=1)


def gpt_problem(layers: int = 4, width: int = 128, device: str = "cpu") -> Problem:
    """The GPT's problem: each byte from those before it."""
    data = datasets.topics()

    def prepare(windows: Tensor) -> Tensor:
        return windows.long()

    return Problem(
        data, lambda: models.GPT(layers, width), CategoricalLikelihood(class_dim=-1), prepare, labelled=True,
        device=device, evaluated=512, evaluation_batch=32,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = flags(__doc__ or "", data=False)
    args = setup(parser, argv)
    return compare(gpt_problem(device=args.device), args, DEFAULTS, "gpt_topics")


if __name__ == "__main__":
    sys.exit(main())
