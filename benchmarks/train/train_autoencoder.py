"""The main job: the deep autoencoder, trained by FishLeg and by torch's AdamW; ends in a table and a plot.

    python -m benchmarks.train.train_autoencoder                                  # CURVES, generated here
    python -m benchmarks.train.train_autoencoder --dataset mnist --data DIR       # IDX files in DIR
    python -m benchmarks.train.train_autoencoder --dataset digits                 # scikit-learn's, in seconds

Ctrl-C stops it: the table and the plot then show what was reached.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import models
from benchmarks.train import datasets
from benchmarks.train.compare import Defaults, compare, flags, setup
from benchmarks.train.training import Problem, squared_error
from fishleg_fast import BernoulliLikelihood

WIDTHS = {"curves": models.CURVES_WIDTHS, "mnist": models.MNIST_WIDTHS, "digits": models.DIGITS_WIDTHS}
DEFAULTS = {
    "curves": Defaults(steps=500, batch_size=1000, lr_fishleg=2e-2, lr_adamw=2e-3),
    "mnist": Defaults(steps=300, batch_size=500, lr_fishleg=1.5e-2, lr_adamw=2e-3),
    "digits": Defaults(steps=300, batch_size=250, lr_fishleg=1.5e-2, lr_adamw=4e-3),
}


def autoencoder_problem(dataset: str, data_dir: str | Path | None = None, device: str = "cpu") -> Problem:
    """The autoencoder's problem on the data set named; Bernoulli likelihood of grey values, from logits."""
    if dataset == "mnist":
        if data_dir is None:
            raise datasets.DataError("--dataset mnist needs --data DIR, the folder with MNIST's four IDX files.")
        data = datasets.mnist(data_dir)
    else:
        data = datasets.curves() if dataset == "curves" else datasets.digits()
    return Problem(
        data,
        lambda: models.autoencoder(WIDTHS[dataset]),
        BernoulliLikelihood(),
        metrics={"mse": squared_error},
        device=device,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = flags(__doc__ or "")
    parser.add_argument("--dataset", choices=list(WIDTHS), default="curves")
    args = setup(parser, argv)
    try:
        problem = autoencoder_problem(args.dataset, args.data, args.device)
    except datasets.DataError as error:
        parser.exit(2, f"{error}\n")
    return compare(problem, args, DEFAULTS[args.dataset], f"autoencoder_{args.dataset}", reconstructions=True)


if __name__ == "__main__":
    sys.exit(main())
