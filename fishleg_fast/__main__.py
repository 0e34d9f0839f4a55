"""``python -m fishleg_fast``: versions, and each backend with the reason if it cannot be used here.

``python -m fishleg_fast --check``: every op of every backend on the current device, at every precision, beside the
reference and float64; exit status 1 if one is wrong. ``--tune [PRECISION ...]``: what is fastest there, kept in the
user's cache (``FISHLEG_FAST_CACHE``: another folder, or "off").

``python -m fishleg_fast --estimate package.module:model``: what λ of a model takes, by counts. ``model`` is one, or a
function without arguments that makes it, on torch's "meta" device if it likes.

``python -m fishleg_fast --plan [package.module:model] [--ranks N ...]``: what it takes of each of so many ranks (8, 64
and 512), by counts: memory, and bytes sent; without a model, of a transformer of 7 B parameters.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import platform
import sys
from collections.abc import Callable, Sequence
from operator import attrgetter

import torch
from torch import nn

from . import native
from ._version import __version__
from .backends import registry
from .model.estimate import estimate
from .precision import PRECISIONS
from .selfcheck import command
from .selfcheck.identity import triton_version
from .sharded.plan import plan, transformer_7b


def _extension_version() -> str:
    found = native.available()
    if not found.supported:
        return f"unavailable: {found.reason}"
    features = native.features()
    compilers = ", ".join(str(features[key]) for key in ("compiler", "cuda_compiler") if features[key])
    return f"{native.version()} ({compilers})"


DEFAULT_PRECISION = "high"  # that an optimizer takes on a CUDA device


def report() -> str:
    """The text that ``python -m fishleg_fast`` prints."""
    rows = [
        ("fishleg_fast", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", triton_version()),
        ("extension", _extension_version()),
    ]
    if native.available().supported:
        rows.append(("its CUDA", native.cuda_status().reason))
    backend_rows = [
        (name, ("available" if found.supported else "unavailable") + (f": {found.reason}" if found.reason else ""))
        for name, found in registry.report()
    ]
    width = max(len(name) for name, _ in rows + backend_rows)
    lines = [f"{name:<{width}}  {text}" for name, text in rows]
    lines += ["", "backends", *(f"{name:<{width}}  {text}" for name, text in backend_rows)]
    return "\n".join(lines)


def _told(option: str, where: str, tell: Callable[[nn.Module], str]) -> str:
    """Of a model named as ``package.module:name``. SystemExit with the reason where there is none."""
    module, _, name = where.partition(":")
    if not module or not name:
        raise SystemExit(f"{option} should be like package.module:model but is: {where!r}")
    try:
        return tell(_model(attrgetter(name)(importlib.import_module(module))))
    except Exception as error:  # of the user's own module and function too
        raise SystemExit(f"{option} {where}: {type(error).__name__}: {error}") from error


def estimated(where: str) -> str:
    """The table for a model named as ``package.module:name``. SystemExit with the reason where there is none."""
    return _told("--estimate", where, lambda model: str(estimate(model)))


def planned(where: str, ranks: Sequence[int]) -> str:
    """The tables for a model, or for the one of ``transformer_7b``."""
    tell = lambda model: "\n\n".join(str(plan(model, count)) for count in ranks)
    return _told("--plan", where, tell) if where else tell(transformer_7b())


def _model(found: object) -> nn.Module:
    """A model, or what the function makes; TypeError where that is none."""
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise TypeError(f"should be a model, or a function that makes one, but is: {found!r}")
    needed = _needed(found)
    if needed:
        raise TypeError(
            f"should take no arguments but needs: {', '.join(needed)}; name a function that makes the model with those"
        )
    made = found()
    if not isinstance(made, nn.Module):
        raise TypeError(f"should be a model, or make one, but makes: {type(made).__name__}")
    return made


def _needed(function: Callable[..., object]) -> list[str]:
    """The arguments that it cannot do without, where that can be told."""
    try:
        known = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # compiled functions
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in known if p.default is p.empty and p.kind not in optional]


def _device() -> torch.device:
    """The current CUDA device, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def checked() -> int:
    """``--check``: the exit status."""
    device = _device()
    places, kept = registry.defaults(device, torch.float32)[0], True
    for name in registry.BACKENDS:
        found = registry.available(name, device, torch.float32)
        if not found.supported:
            print(f"{name} is not checked: {found.reason}")
    if not places:  # those that are trusted there can be checked too
        places, kept = {n: row.place for n, row in registry.BACKENDS.items() if _checkable(n, device)}, False
    if not places:
        print(f"there is no other backend than the reference on {device}")
        return 0
    return 0 if command.check(places, device, _say, kept) else 1


def _checkable(name: str, device: torch.device) -> bool:
    return name != "reference" and registry.available(name, device, torch.float32).supported


def tuned(precisions: Sequence[str]) -> int:
    """``--tune``: the exit status."""
    device = _device()
    places, sure = registry.defaults(device, torch.float32)
    if not places:
        print(f"there is nothing to tune on {device}, where backend {sure!r} is taken")
        return 1
    return 0 if command.tune(places, device, precisions, _say) else 1


def _say(line: str) -> None:
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fishleg_fast", description=(__doc__ or "").split("\n")[0])
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--estimate", metavar="MODULE:MODEL", help="print what λ of this model takes instead")
    one.add_argument("--check", action="store_true", help="check all ops on the current device instead")
    one.add_argument(
        "--tune", nargs="*", metavar="PRECISION",
        help=f"find what is fastest on the current device instead, at these precisions: {', '.join(PRECISIONS)} "
        f"(without any: {DEFAULT_PRECISION})",
    )  # fmt: skip
    one.add_argument("--plan", nargs="?", const="", metavar="MODULE:MODEL", help="print what several ranks would take")
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64, 512], help="of --plan (default: 8 64 512)")
    args = parser.parse_args(argv)
    if min(args.ranks) < 1:
        parser.error(f"argument --ranks: should be at least 1 but is: {min(args.ranks)}")
    if args.plan is not None:
        print(planned(args.plan, args.ranks))
        return 0
    if args.check:
        return checked()
    if args.tune is not None:
        unknown = [name for name in args.tune if name not in PRECISIONS]
        if unknown:
            parser.error(f"argument --tune: should be of {', '.join(PRECISIONS)} but is: {' '.join(unknown)}")
        return tuned(args.tune or [DEFAULT_PRECISION])
    print(estimated(args.estimate) if args.estimate else report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
