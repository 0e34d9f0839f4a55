"""The kernel families that are checked and dispatched one by one, and ops composed of several backends'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..algebra.maths import Applications, Aux
from ..algebra.matrix import Matrix
from ..algebra.structures.base import LayerStatistics
from ..backends import reference
from ..backends.protocol import LambdaOptions, Ops, ThetaOptions
from ..model.block import Block

# family -> its op; normalize="spectral" has kernels of its own
FAMILIES = {
    "refresh": "refresh",
    "qv": "qv",
    "inner": "inner",
    "lambda_step": "lambda_step",
    "theta_step": "theta_step",
    "spectral": "theta_step",
}
# class of a list of blocks -> the largest shorter side of a block up to which it counts; classless: "inner"
SHAPE_CLASSES = {"small": 256, "medium": 1024, "large": 1 << 62}
CLASSLESS = "inner"

Choice = Mapping[str, Mapping[str, str]]  # family -> shape class -> the backend's name


def shape_class(blocks: Sequence[Block]) -> str:
    """The class of a list of blocks: that of the one whose products are the largest."""
    side = max((min(block.shape) for block in blocks), default=0)
    return next(name for name, most in SHAPE_CLASSES.items() if side <= most)


def the_same(name: str) -> dict[str, str]:
    """One backend in every shape class."""
    return dict.fromkeys(SHAPE_CLASSES, name)


def used(choice: Choice) -> list[str]:
    """The backends that a choice names, the most frequent first."""
    names = [name for by_class in choice.values() for name in by_class.values()]
    return sorted(dict.fromkeys(names), key=lambda name: -names.count(name))


class ComposedOps:
    """Ops of several backends: each family's by the shape class of the blocks, and anchoring by the reference."""

    average_moments: Callable[[Sequence[Block], Sequence[LayerStatistics | Aux], float, bool], list[Block]]
    start_kfac: Callable[[Sequence[Block], float], None]
    natural_step: Callable[[Sequence[Block], float, float], None]

    def __init__(self, choice: Choice, backends: Mapping[str, Ops]) -> None:
        self._functions = {
            family: {kind: getattr(backends[name], FAMILIES[family]) for kind, name in by_class.items()}
            for family, by_class in choice.items()
        }
        self.average_moments, self.start_kfac = reference.average_moments, reference.start_kfac
        self.natural_step = reference.natural_step

    def _function(self, family: str, blocks: Sequence[Block]) -> Callable[..., Any]:
        by_class = self._functions[family]
        functions = list(by_class.values())
        return functions[0] if functions.count(functions[0]) == len(functions) else by_class[shape_class(blocks)]

    def refresh(self, blocks: Sequence[Block], applications: Sequence[Applications] | None = None) -> None:
        self._function("refresh", blocks)(blocks, applications)

    def qv(self, blocks: Sequence[Block], us: Sequence[Matrix]) -> list[Matrix]:
        return self._function("qv", blocks)(blocks, us)

    def inner(self, xs: Sequence[Matrix], ys: Sequence[Matrix]) -> Tensor:
        return self._function("inner", ())(xs, ys)

    def theta_step(self, blocks: Sequence[Block], gs: Sequence[Matrix], options: ThetaOptions) -> tuple[Tensor, Tensor]:
        family = "spectral" if options.normalize == "spectral" else "theta_step"
        return self._function(family, blocks)(blocks, gs, options)

    def lambda_step(
        self,
        blocks: Sequence[Block],
        us: Sequence[Matrix],
        vs: Sequence[Matrix],
        fvs: Sequence[Matrix],
        options: LambdaOptions,
    ) -> tuple[Tensor, Tensor]:
        return self._function("lambda_step", blocks)(blocks, us, vs, fvs, options)


def composed(choice: Choice, backends: Mapping[str, Ops]) -> Ops:
    """The ops of a choice: a backend's own where it is in every place."""
    names = used(choice)
    return backends[names[0]] if len(names) == 1 else ComposedOps(choice, backends)  # type: ignore[return-value]
