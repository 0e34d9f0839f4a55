"""The site: built without a warning, and read without a network. Where make setup-docs was run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.pages import PAGES, ROOT

pytest.importorskip("mkdocs", reason="make setup-docs installs what builds the site")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return folder


def test_every_page_is_there_and_asks_nothing_of_other_hosts(site: Path) -> None:
    pages = [page for page in site.rglob("*.html") if page.name != "404.html"]
    assert len(pages) == len(PAGES)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?([^\s\">]+)", text)
        assert loaded and not [address for address in loaded if "//" in address], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_formulas_are_drawn_by_the_browser(site: Path) -> None:
    text = (site / "mathematics.html").read_text(encoding="utf-8")
    assert text.count("<math") > 50 and "arithmatex" not in text and "merror" not in text
    assert (site / "fonts/STIXTwoMath.woff2").stat().st_size > 50_000


def test_what_a_hook_makes_of_docstrings() -> None:
    sys.path.insert(0, str(ROOT / "docs/hooks"))
    try:
        from docstrings import markdown
    finally:
        sys.path.pop(0)
    made = markdown(
        "Does.\n\nThe step:\n    lr: a size,\n        of it.\n    a, b: two.\n\nRaises:\n    TypeError: wrong."
    )
    assert "**The step**" in made and "- `lr`: a size,\n    of it.\n- `a`, `b`: two." in made
    assert "Raises:\n    TypeError: wrong." in made
    assert markdown("See :class:`Kron`.\n\nArgs:\n    a: one.") == "See `Kron`.\n\nArgs:\n    a: one."
    assert "- `k`: of it" in markdown("Does.\n\nk: of it\n    all.") and "**Args**" in markdown(
        "Args:\n    m, n: sizes."
    )
