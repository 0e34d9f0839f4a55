"""How many aten operations a step's reference path takes: what a GPU without our kernels would launch, and wait for.

    python -m benchmarks.cpu.op_counts

Counted at the dispatcher, on a CPU with capturable=True, which decides everything on the device as a step on a GPU
does. ``own``: of the optimizer, but for views, which launch nothing. ``passes``: of the forward, backward and
forward-mode passes through the model that an update of λ and anchoring take. ``waits``: reads of single values, for
some of which a host would wait for its GPU (seeds are drawn on the host).
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common.arguments import positive
from benchmarks.common.machine import cpu_name
from benchmarks.common.tables import table
from fishleg_fast import FishLeg, GaussianLikelihood, __version__
from fishleg_fast.fisher.layer_pass import LayerPass
from fishleg_fast.passes.isolated import IsolatedPasses

WAITS = ("aten._local_scalar_dense.default", "aten.is_nonzero.default", "aten.equal.default")
OPS = ("refresh", "qv", "inner", "theta_step", "lambda_step", "average_moments", "start_kfac")
# Layers are checked against their gradients at the second anchoring, and not at the sixth.
STEPS = {"ordinary": 2, "λ update and anchoring": 51, "the same, layers checked": 11}


class Counted(TorchDispatchMode):
    """Counts operations: the optimizer's own, and those of passes through the model."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.views, self.passes = Counter[str](), Counter[str](), Counter[str]()
        self.inside = False  # a pass, but not in an op of the optimizer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        counter = self.passes if self.inside else self.views if func.is_view else self.own
        counter[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def waits(self) -> int:
        """How often the host waited for the device."""
        return sum((self.own + self.passes)[name] for name in WAITS)

    @contextmanager
    def marked(self, inside: bool) -> Iterator[None]:
        """What is counted is of a pass, or is not."""
        before, self.inside = self.inside, inside
        try:
            yield
        finally:
            self.inside = before

    def as_marked(self, function: Callable, inside: bool) -> Callable:
        """The function, whose operations are of a pass, or are not."""

        @functools.wraps(function)
        def marked(*args: Any, **kwargs: Any) -> Any:
            with self.marked(inside):
                return function(*args, **kwargs)

        return marked


def trained(layers: int, width: int, bias: bool, **settings: Any) -> FishLeg:
    """An optimizer of that many equal layers, whose next step is an ordinary one, with its gradients."""
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(width, width, bias=bias) for _ in range(layers)])
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.eye(width) + 0.01 * torch.randn(width, width) if p.ndim == 2 else torch.zeros(width))
    likelihood, x, y = GaussianLikelihood(), torch.randn(8, width), torch.randn(8, width)
    settings = {"backend": "reference", "capturable": True, "update_aux_every": 10, **settings}
    optimizer = FishLeg(net, likelihood=likelihood, lr=1e-3, **settings)

    def backward() -> None:
        optimizer.zero_grad()
        likelihood.nll(y, net(x)).backward()

    optimizer.backward = backward  # type: ignore[attr-defined]
    return optimizer


def counts(optimizer: FishLeg, steps: int) -> Counted:
    """Those of the last of so many steps."""
    for step in range(steps):
        optimizer.backward()  # type: ignore[attr-defined]
        counted = Counted()
        if step + 1 < steps:
            optimizer.step()
            continue
        ops = optimizer._ops
        with ExitStack() as stack:
            own = [(ops, name) for name in OPS] + [(LayerPass, "_on_shown")]
            for place, name, inside in (*((*mine, False) for mine in own), (IsolatedPasses, "run", True)):
                marked = counted.as_marked(getattr(place, name), inside)
                stack.enter_context(mock.patch.object(place, name, marked))
            stack.enter_context(counted)
            optimizer.step()
    return counted


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=positive, default=100, help="equal layers (default: %(default)s)")
    parser.add_argument("--width", type=positive, default=16, help="of each (default: %(default)s)")
    parser.add_argument("--top", type=int, default=0, help="also print so many operations of each step")
    args = parser.parse_args(argv)
    rows = []
    for normalize in ("rms", "spectral"):
        for bias in (False, True):
            for name, steps in STEPS.items():
                found = counts(trained(args.layers, args.width, bias, normalize=normalize), steps)
                own, views, passes = (sum(c.values()) for c in (found.own, found.views, found.passes))
                rows.append([name, normalize, "yes" if bias else "no", *map(str, (own, views, passes, found.waits))])
                for op, count in found.own.most_common(args.top):
                    print(f"{name:30} {normalize:9} {op:50} {count}")
    print(f"{cpu_name()}, torch {torch.__version__}, fishleg_fast {__version__}: {args.layers} layers\n")
    print(table(["step", "normalize", "bias", "own", "views", "passes", "waits"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
