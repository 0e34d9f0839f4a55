"""ResNet18 trained by FishLeg and by torch's AdamW, on CIFAR-10 or small digits; ends in a table and a plot.

    python -m benchmarks.train.train_resnet               # scikit-learn's digits, a narrow ResNet18: for any CPU
    python -m benchmarks.train.train_resnet --data DIR    # CIFAR-10's binary files in DIR, full width: for a GPU

There is no augmentation: the table compares optimizers on the training loss and is no record of accuracy.
Ctrl-C stops it: the table and the plot then show what was reached.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from benchmarks.common import models
from benchmarks.common.arguments import positive
from benchmarks.train import datasets
from benchmarks.train.compare import Defaults, compare, flags, setup
from benchmarks.train.training import Problem, accuracy
from fishleg_fast import CategoricalLikelihood

DEFAULTS = {
    "digits": Defaults(steps=100, batch_size=128, lr_fishleg=2e-2, lr_adamw=4e-3),
    "cifar10": Defaults(steps=2000, batch_size=256, lr_fishleg=5e-3, lr_adamw=2e-3),
}
WIDTH = {"digits": 16, "cifar10": 64}  # channels of the first stage


def resnet_problem(data_dir: str | Path | None = None, width: int | None = None, device: str = "cpu") -> Problem:
    """ResNet18's problem on CIFAR-10 from `data_dir`, or on the digits; categorical likelihood."""
    data = datasets.digits() if data_dir is None else datasets.cifar10(data_dir)

    def prepare(
        images: Tensor,
    ) -> Tensor:  # (n, channels*h*w) -> (n, channels, h, w), values in about [-2, 2]
        return (datasets.pixels(images).unflatten(1, data.image_shape) - 0.5) * 4

    return Problem(
        data,
        lambda: models.ResNet18(data.image_shape[0], width=width or WIDTH[data.name]),
        CategoricalLikelihood(),
        prepare,
        labelled=True,
        metrics={"accuracy": accuracy},
        device=device,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = flags(__doc__ or "")
    parser.add_argument("--width", type=positive, help="channels of the first stage (digits: 16, CIFAR-10: 64)")
    args = setup(parser, argv)
    try:
        problem = resnet_problem(args.data, args.width, args.device)
    except datasets.DataError as error:
        parser.exit(2, f"{error}\n")
    name = problem.data.name
    return compare(problem, args, DEFAULTS[name], f"resnet18_{name}")


if __name__ == "__main__":
    sys.exit(main())
