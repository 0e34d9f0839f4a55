"""Who imports whom in the package: nobody in a circle, and each part only what it may know of."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from support.import_graph import PACKAGE, Graph, between_components, circle, imports

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {PACKAGE: ROOT / "fishleg_fast", f"{PACKAGE}.kernels": ROOT / "kernels"}
MOST_MODULES = 12  # in one folder, beside __init__.py

# A component is a folder or module of the package, without what has a line of its own. It may import what is in that
# folder and what is named here, for the reason given.
MAY_IMPORT = {
    "_version": ("", "a version is a string"),
    "availability": ("", "it is a pair"),
    "native": ("_version availability", "the extension knows neither torch nor the package"),
    "precision": ("", "torch's settings have nothing to do with the package"),
    "likelihoods": ("", "a likelihood knows outputs and targets alone"),
    "algebra": ("", "matrices and factors of Q know neither models nor optimizers"),
    "model": ("algebra", "blocks and layers know what their λ is, not who steps or learns it"),
    "backends": (
        "algebra model precision native availability",
        "ops are given all that they work on: they know no passes, no Fisher matrix, no options and no optimizer",
    ),
    "backends.reference": (
        "algebra model precision backends.protocol",
        "the reference is plain torch: no other backend and no extension",
    ),
    "backends.registry": ("backends kernels selfcheck", "it is the table of backends, and asks whether one is right"),
    "kernels": ("algebra model backends native", "the Triton kernels are a backend like the others"),
    "kernels.device": ("", "Triton compiles these for a device: nothing of the host is there"),
    "selfcheck": (
        "_version native precision algebra model backends.protocol backends.reference backends.arithmetic "
        "kernels.host.configurations",
        "what checks ops is given them: it knows the reference, and no other backend, but for the tiles that it tunes",
    ),
    "passes": (
        "algebra model likelihoods backends.cpu.agreement",
        "passes know a model and its loss, not what is made of them",
    ),
    "distributed": ("passes.inputs", "ranks agree on tensors and numbers, whatever those are"),
    "fisher": (
        "algebra model passes precision distributed backends.protocol",
        "F v is made of passes, λ learned by ops given",
    ),
    "sharded": (
        "algebra model passes fisher distributed precision backends.protocol backends.reference",
        "ranks share out blocks, and learn each where it is, by ops given and a trust scale over all of them",
    ),
    "options": (
        "model likelihoods precision fisher backends.protocol",
        "options are checked by what is known of their values, and not by who takes them",
    ),
    "checkpoint": ("model", "what is saved is of blocks"),
    "capture": ("model diagnostics", "a graph holds a step, and knows of an optimizer what it is told"),
    "diagnostics": ("model", "what is told is of blocks"),
    "membership": ("model passes options checkpoint sharded", "which blocks there are has nothing to do with steps"),
    "optimizer": (
        "algebra model likelihoods precision backends.registry backends.arithmetic passes fisher options checkpoint "
        "diagnostics capture distributed sharded membership",
        "the optimizer takes the backend that the registry gives it, and nothing takes the optimizer",
    ),
    "integrations": ("likelihoods optimizer", "they make the optimizer as other libraries ask for it"),
    "__init__": ("_version algebra model likelihoods optimizer", "it lists the public names"),
    "__main__": (
        "_version backends.registry model.estimate native precision selfcheck sharded.plan",
        "it reports the backends, whether they are right, and a model's cost, on several ranks too",
    ),
}


@cache
def package() -> Graph:
    return imports(FOLDERS)


def within(module: str, component: str) -> bool:
    return f"{module}.".startswith(f"{component}.")


def faults(graph: Graph) -> list[str]:
    """What is not as MAY_IMPORT has it."""
    gone = [component for component in MAY_IMPORT if not any(within(module, component) for module in graph)]
    found = [f"{component} is no more: MAY_IMPORT should not list it" for component in gone]
    for module, others in graph.items():
        component = max((component for component in MAY_IMPORT if within(module, component)), key=len, default=None)
        if component is None:
            found.append(f"{module} is in no component: MAY_IMPORT should say what it may import")
            continue
        allowed, why = MAY_IMPORT[component]
        wrong = sorted(other for other in others if not any(within(other, r) for r in (component, *allowed.split())))
        found += [f"{module} imports {other}, but {why}" for other in wrong]
    return found


def test_no_module_imports_itself_in_a_circle() -> None:
    assert not circle(package())


def test_no_component_imports_itself_in_a_circle() -> None:
    assert not circle(between_components(package()))


def test_components_import_only_what_they_may() -> None:
    assert not faults(package())


def test_no_folder_holds_more_than_a_few_modules() -> None:
    folders = {file.parent for folder in FOLDERS.values() for file in folder.rglob("*.py")}
    for folder in sorted(folders):
        modules = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
        assert len(modules) <= MOST_MODULES, f"{folder.relative_to(ROOT)}: {sorted(modules)}"


@pytest.mark.parametrize(
    ("module", "other", "fault"),
    [
        ("algebra.structures.kron", "algebra.factors", None),
        ("algebra.structures.kron", "model.block", "algebra.structures.kron imports model.block, but"),
        ("backends.cpu.ops", "backends.reference.products", None),
        ("backends.reference.products", "backends.protocol", None),
        ("backends.reference.products", "native", "backends.reference.products imports native, but"),
        ("kernels.device.rows", "kernels.host", "kernels.device.rows imports kernels.host, but"),
        ("kernels.host", "kernels.device.rows", None),
        ("likelihoods", "__init__", "likelihoods imports __init__, but"),
        ("modelling", "algebra.structures.kron", "modelling is in no component"),
    ],
)
def test_what_a_component_may_not_import_is_found(module: str, other: str, fault: str | None) -> None:
    found = faults({**{component: set() for component in MAY_IMPORT}, other: set(), module: {other}})
    assert [text[: len(fault or "")] for text in found] == ([fault] if fault else [])


def test_a_component_that_is_no_more_is_found() -> None:
    (found,) = faults({component: set() for component in MAY_IMPORT if component != "passes"})
    assert found.startswith("passes is no more")
