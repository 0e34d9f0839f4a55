"""What the library's docstrings have beyond Google's style, for mkdocstrings: sections of arguments with headings of
their own, and roles of Sphinx.
"""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

import griffe

_KNOWN = {"Args", "Attributes", "Raises", "Returns", "Yields", "Source"}
_HEADING = re.compile(r"^(?P<title>\S.*):$")
_ITEM = re.compile(r"^(?P<names>\w+(?:, \w+)*): (?P<text>.*)$")
_ARGUMENT = re.compile(r"^[a-z]\w*: ")  # without a heading
_SHARED = re.compile(r"^    \w+, \w+: ")  # of several arguments, which Google's style does not have
_ROLE = re.compile(r":(?:class|func|meth|mod):`([^`]+)`")


def markdown(docstring: str) -> str:
    """With headings of arguments as bold lines and the arguments as lists; what else is indented stays as it is."""
    lines, made = _ROLE.sub(r"`\1`", docstring).splitlines(), list[str]()
    k = 0
    while k < len(lines):
        heading = _HEADING.match(lines[k])
        body = _indented(lines, k + 1)
        if _ARGUMENT.match(lines[k]):
            while k < len(lines) and _ARGUMENT.match(lines[k]):
                body = _indented(lines, k + 1)
                made += _item(lines[k], [line.strip() for line in body if line.strip()])
                k += 1 + len(body)
            continue
        shared = heading is not None and heading["title"] == "Args" and any(_SHARED.match(line) for line in body)
        if not heading or not body or (heading["title"] in _KNOWN and not shared):
            made.append(lines[k])
            k += 1
            continue
        k += 1 + len(body)
        items = dedent("\n".join(body)).splitlines()
        if not _ITEM.match(items[0]):
            made += [heading.string, *body]
            continue
        made += ["", f"**{heading['title']}**", ""]
        for item in items:
            made += _item(item, []) if _ITEM.match(item) else [f"    {item.strip()}"]
        made.append("")
    return "\n".join(made)


def _item(line: str, more: list[str]) -> list[str]:
    """Of a list: "name, name: text", and the lines that go on with it."""
    names, _, text = line.partition(": ")
    return ["- " + ", ".join(f"`{name}`" for name in names.split(", ")) + f": {text}", *(f"    {m}" for m in more)]


def _indented(lines: list[str], first: int) -> list[str]:
    """The lines from ``first`` on that are indented, and those between them that are empty."""
    last = first
    for k in range(first, len(lines)):
        if lines[k].startswith("    "):
            last = k + 1
        elif lines[k].strip():
            break
    return lines[first:last]


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **given: Any) -> None:
        """Griffe calls it with each object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
