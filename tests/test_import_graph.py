"""That the tests of the package's imports can fail: circles in small packages are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.import_graph import PACKAGE, between_components, circle, imports

HIDDEN = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {}"
LATE = "def f():\n    if True:\n        {}"


def tree(folder: Path, **texts: str) -> dict[str, set[str]]:
    """The graph of a package of a module a and a folder b with c and d in it."""
    (folder / "b").mkdir()
    for name, path in {"top": "__init__", "a": "a", "b": "b/__init__", "c": "b/c", "d": "b/d"}.items():
        (folder / f"{path}.py").write_text(texts.get(name, "import ast, torch.nn\nfrom os import path\n"))
    return imports({PACKAGE: folder})


@pytest.mark.parametrize(
    ("a", "c"),
    [
        ("from .b.c import f", "from ..a import g"),
        ("from .b import c", "from .. import a"),
        ("import fishleg_fast.b.c", "import torch, fishleg_fast.a as x"),
        ("from fishleg_fast.b import c as x", "from fishleg_fast.a import *"),
        (HIDDEN.format("from .b import c"), LATE.format("from .. import a")),
    ],
)
def test_a_circle_is_found(a: str, c: str, tmp_path: Path) -> None:
    graph = tree(tmp_path, a=a, c=c)
    assert circle(graph) in ("a imports b.c imports a", "b.c imports a imports b.c")
    assert circle(between_components(graph)) in ("a imports b imports a", "b imports a imports b")


def test_a_folder_is_a_module_only_where_its_own_names_are_taken(tmp_path: Path) -> None:
    graph = tree(tmp_path, top="from .b import f", b="from .c import f", c="from . import d", a="from . import b")
    assert graph == {"__init__": {"b"}, "a": {"b"}, "b": {"b.c"}, "b.c": {"b.d"}, "b.d": set()}
    assert not circle(graph)
    (tmp_path / "b/d.py").write_text("from . import f")
    assert "b imports b.c" in circle(imports({PACKAGE: tmp_path}))


def test_a_folder_beside_the_package_is_in_it(tmp_path: Path) -> None:
    tree(tmp_path)
    (tmp_path / "b/c.py").write_text("from .. import a")
    graph = imports({PACKAGE: tmp_path, f"{PACKAGE}.kernels": tmp_path / "b"})
    assert graph["kernels.c"] == {"a"} and graph["kernels"] == set()


def test_a_circle_of_components_is_found_where_there_is_none_of_modules() -> None:
    graph = {"model.x": {"algebra.y"}, "algebra.y": set(), "algebra.z": {"model.x"}}
    assert not circle(graph) and circle(between_components(graph))


def test_backends_and_kernels_are_one_component_below_the_registry() -> None:
    graph = {"backends.registry": {"kernels.x"}, "kernels.x": {"backends.y"}, "backends.y": {"kernels.z"}}
    assert not circle(between_components(graph))
    assert circle(between_components(graph | {"kernels.z": {"backends.registry"}}))
