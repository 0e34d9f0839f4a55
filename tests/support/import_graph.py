"""Who imports whom in a package, read off its text."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = "fishleg_fast"
REGISTRY = "backends.registry"
Graph = Mapping[str, set[str]]  # of each module, those that it imports


def named(node: ast.AST, package: str, files: Mapping[str, Path]) -> Iterator[str]:
    """The modules that a statement in a module of ``package`` imports; of ``from a import b`` a.b, if it is one."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parts = package.split(".")
        above = parts[: len(parts) + 1 - node.level] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            yield whole if (whole := f"{base}.{alias.name}") in files else base


def short(name: str) -> str:
    return name.removeprefix(PACKAGE).removeprefix(".") or "__init__"


def imports(folders: Mapping[str, Path]) -> dict[str, set[str]]:
    """The graph of the modules in ``folders``, each with its name, wherever in a module its imports stand.

    Modules are named without the package, and a folder's __init__.py as the folder.
    """
    files = {}
    for name, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            files[".".join((name, *parts)).removesuffix(".__init__")] = path
    graph = {}
    for name, path in files.items():
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        graph[short(name)] = {short(m) for node in nodes for m in named(node, package, files) if m in files}
    return graph


def circle(graph: Graph) -> str:
    """One, if there is any."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " imports ".join(reversed(error.args[1]))
    return ""


def between_components(graph: Graph) -> dict[str, set[str]]:
    """The graph of what lies right below the package: backends and kernels as one, without the registry above them."""

    def component(module: str) -> str:
        top = module.partition(".")[0]
        return module if module == REGISTRY else "backends and kernels" if top in ("backends", "kernels") else top

    found: dict[str, set[str]] = {}
    for module, others in graph.items():
        found.setdefault(component(module), set()).update({component(other) for other in others} - {component(module)})
    return found
