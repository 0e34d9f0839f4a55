"""A wide MLP on the bytes of Python's help texts, trained by FishLeg and by torch's AdamW; ends in a table and a plot.

    python -m benchmarks.train.train_mlp

Each byte from the sixteen before it. Ctrl-C stops it: the table and the plot then show what was reached.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from benchmarks.common import models
from benchmarks.train import datasets
from benchmarks.train.compare import Defaults, compare, flags, setup
from benchmarks.train.training import Problem, accuracy
from fishleg_fast import CategoricalLikelihood

DEFAULTS = Defaults(steps=400, batch_size=256, lr_fishleg=2e-2, lr_adamw=2e-3, adamw_ratio=1)
CONTEXT = 16


def mlp_problem(widths: Sequence[int] = (1024, 512), device: str = "cpu") -> Problem:
    """The wide MLP's problem."""
    data = datasets.topics(CONTEXT, stride=4)
    assert data.train_labels is not None and data.test_labels is not None
    data = replace(data, train_labels=data.train_labels[:, -1], test_labels=data.test_labels[:, -1])

    def prepare(windows: Tensor) -> Tensor:
        return windows.long()

    return Problem(
        data, lambda: models.ByteMLP(CONTEXT, widths=widths), CategoricalLikelihood(), prepare, labelled=True,
        metrics={"accuracy": accuracy}, device=device, evaluated=8192,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = flags(__doc__ or "", data=False)
    args = setup(parser, argv)
    return compare(mlp_problem(device=args.device), args, DEFAULTS, "mlp_topics")


if __name__ == "__main__":
    sys.exit(main())
