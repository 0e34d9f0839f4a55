"""Links between the pages of docs/ lead somewhere, without MkDocs: files, headings, names of the API, files of the
repository.
"""

from __future__ import annotations

import pkgutil
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.pages import DOCS, PAGES, ROOT, prose

_LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_HEADING = re.compile(r"^#+ (?P<text>.*?)(?: \{#(?P<name>[\w-]+)\})?$", re.MULTILINE)
_SHOWN = re.compile(r"^::: (?P<name>[\w.]+)$", re.MULTILINE)
_FILE = re.compile(
    r"`(?P<path>(?:(?:benchmarks|csrc|docs|examples|fishleg_fast|kernels|tests)/[\w./-]+|[A-Z]+\.md|\w+\.(?:toml|yml)))`"
)


def slug(heading: str) -> str:
    """As Python-Markdown's toc makes it of a heading's text."""
    text = unicodedata.normalize("NFKD", heading.replace("`", "")).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower())


def anchors(page: Path) -> set[str]:
    """Of a page: its headings, numbered where they repeat, and what it shows of the API."""
    text = page.read_text(encoding="utf-8")
    found: set[str] = {m["name"] for m in _SHOWN.finditer(text)}
    for m in _HEADING.finditer(prose(text)):
        plain = (
            text.splitlines()[prose(text).count("\n", 0, m.start())].lstrip("#").strip()
        )  # with what is in backticks
        name, n = m["name"] or slug(plain), 1
        while (name if n == 1 else f"{name}_{n - 1}") in found:
            n += 1
        found.add(name if n == 1 else f"{name}_{n - 1}")
    return found


def faults(page: Path, text: str) -> Iterator[str]:
    """What is wrong with the links in a page's text."""
    for m in _LINK.finditer(prose(text)):
        path, _, anchor = m["target"].partition("#")
        if path.startswith(("http://", "https://")):
            continue
        there = page if not path else (page.parent / path).resolve()
        if not there.is_file() or not there.is_relative_to(DOCS):
            yield f"{m['target']}: no such file in docs/"
        elif anchor and anchor not in anchors(there):
            yield f"{m['target']}: no such heading, of {sorted(anchors(there))}"
    for m in _FILE.finditer(re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)):
        if not (ROOT / m["path"]).exists():
            yield f"{m['path']}: no such file in the repository"


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(DOCS)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    assert list(faults(page, page.read_text(encoding="utf-8"))) == []


def test_links_that_lead_nowhere_are_found() -> None:
    page = DOCS / "index.md"
    for wrong in ("[a](nowhere.md)", "[a](quickstart.md#nowhere)", "[a](../README.md)", "`fishleg_fast/nowhere.py`"):
        assert len(list(faults(page, wrong))) == 1, wrong
    right = "[a](quickstart.md#what-each-part-does), `[a](nowhere.md)`, [a](api/fishleg.md#fishleg_fast.FishLeg)"
    assert list(faults(page, right)) == []
    assert slug("`precision`: the optimizer's own λ") == "precision-the-optimizers-own"


def test_what_the_api_pages_show_exists() -> None:
    names = [m["name"] for page in PAGES for m in _SHOWN.finditer(page.read_text(encoding="utf-8"))]
    assert len(names) == len(set(names)) > 20
    for name in names:
        pkgutil.resolve_name(name)


def test_the_api_pages_show_all_public_names() -> None:
    import fishleg_fast

    shown = {m["name"] for page in PAGES for m in _SHOWN.finditer(page.read_text(encoding="utf-8"))}
    public = {f"fishleg_fast.{name}" for name, value in vars(fishleg_fast).items() if isinstance(value, type)}
    assert public - shown == set()


def test_every_page_is_in_the_menu_once() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r": ([\w/]+\.md)$", menu, flags=re.MULTILINE)
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)
