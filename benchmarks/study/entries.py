"""Who takes part in the convergence study: rows of OPTIMIZERS, and the lr that each one's search starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.common.optimizers import VARIATIONS


@dataclass(frozen=True)
class Entry:
    """Problem -> grid of lr. Of the rows of one family, the best in tuning is the one that is reported."""

    family: str
    lrs: Mapping[str, tuple[float, ...]]


FISHLEG_LR = {"curves-1000": 8e-2, "curves-100": 1e-2, "gpt": 2e-2, "resnet": 2e-2, "mlp": 2e-2}
FISHLEG_GRID = {problem: (lr / 2, lr, lr * 2) for problem, lr in FISHLEG_LR.items()}

ADAMW_GRID = {
    "curves-1000": (1e-3, 2e-3, 4e-3),
    "curves-100": (2e-3, 4e-3, 8e-3),
    "gpt": (5e-4, 1e-3, 2e-3),
    "resnet": (2e-3, 4e-3, 8e-3, 1.6e-2),
    "mlp": (1e-3, 2e-3, 4e-3),
}
MUON_GRID = {
    "curves-1000": (1e-2, 2e-2, 4e-2),
    "curves-100": (5e-3, 1e-2, 2e-2),
    "gpt": (5e-3, 1e-2, 2e-2),
    "resnet": (5e-3, 1e-2, 2e-2),
    "mlp": (5e-3, 1e-2, 2e-2),
}
SOAP_GRID = {
    "curves-1000": (6e-3, 1.2e-2, 2.4e-2),
    "curves-100": (6e-3, 1.2e-2, 2.4e-2),
    "gpt": (3e-3, 6e-3, 1.2e-2),
    "resnet": (3e-3, 6e-3, 1.2e-2),
    "mlp": (3e-3, 6e-3, 1.2e-2),
}
PSGD_GRID = dict.fromkeys(("curves-1000", "curves-100", "gpt", "resnet"), (1e-3, 2e-3, 4e-3))

STUDY = {
    "adamw": Entry("adamw", ADAMW_GRID),
    "muon": Entry("muon", MUON_GRID),
    "soap": Entry("soap", SOAP_GRID),
    "psgd": Entry("psgd", PSGD_GRID),
    "fishleg": Entry("fishleg", FISHLEG_GRID),
    # Settings that the authors of transformers change, or leave open, at the lr that is best with the usual ones.
    "adamw-0.95": Entry("adamw", {"gpt": (1e-3,)}),
    "muon-rest-x0.3": Entry("muon", {"gpt": (1e-2,)}),
    "muon-rest-x3": Entry("muon", {"gpt": (1e-2,)}),
}

# FishLeg with one setting changed: these run only where --only names them.
OTHERS = [
    *VARIATIONS,
    *("fishleg-unlimited", "fishleg-learned", "fishleg-pure", "fishleg-pure-unlimited", "fishleg-pure-adam"),
]
ENTRIES = {**STUDY, **{name: Entry(name, FISHLEG_GRID) for name in OTHERS}}


def is_fishleg(name: str) -> bool:
    """Whether a row of OPTIMIZERS is FishLeg or one of its variations."""
    return name.startswith("fishleg")
