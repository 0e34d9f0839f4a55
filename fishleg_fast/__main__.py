"""``python -m fishleg_fast``: versions, and each backend with the reason if it cannot be used here.

``python -m fishleg_fast --estimate package.module:model``: what λ of a model takes, by counts. ``model`` is one, or a
function without arguments that makes it, on torch's "meta" device if it likes.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import platform
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from operator import attrgetter

import torch
from torch import nn

from . import native
from ._version import __version__
from .backends import registry
from .model.estimate import estimate


def _triton_version() -> str:
    try:
        return metadata.version("triton")  # read, not imported: a broken Triton must not break this report
    except metadata.PackageNotFoundError:
        return "not installed"


def _extension_version() -> str:
    found = native.available()
    if not found.supported:
        return f"unavailable: {found.reason}"
    features = native.features()
    compilers = ", ".join(str(features[key]) for key in ("compiler", "cuda_compiler") if features[key])
    return f"{native.version()} ({compilers})"


def report() -> str:
    """The text that ``python -m fishleg_fast`` prints."""
    rows = [
        ("fishleg_fast", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", _triton_version()),
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


def estimated(where: str) -> str:
    """The table for a model named as ``package.module:name``. SystemExit with the reason where there is none."""
    module, _, name = where.partition(":")
    if not module or not name:
        raise SystemExit(f"--estimate should be like package.module:model but is: {where!r}")
    try:
        return str(estimate(_model(attrgetter(name)(importlib.import_module(module)))))
    except Exception as error:  # of the user's own module and function too
        raise SystemExit(f"--estimate {where}: {type(error).__name__}: {error}") from error


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


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fishleg_fast", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--estimate", metavar="MODULE:MODEL", help="print what λ of this model takes instead")
    args = parser.parse_args(argv)
    print(estimated(args.estimate) if args.estimate else report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
