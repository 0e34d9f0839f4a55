"""Formulas as MathML, which browsers draw by themselves: no script, no network."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex makes of $…$ and $$…$$.
_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">(?:\\\((?P<inline>.*?)\\\)|\\\[(?P<block>.*?)\\\])</(?P=tag)>', re.DOTALL
)


def _mathml(found: re.Match[str]) -> str:
    block = found["block"]
    source = html.unescape(found["inline"] if block is None else block).strip()
    made = convert(source, display="inline" if block is None else "block")
    return made if block is None else f'<div class="formula">{made}</div>'


def on_page_content(text: str, **given: Any) -> str:
    """MkDocs calls it with a page's HTML."""
    found = _FORMULA.sub(_mathml, text)
    if 'class="arithmatex"' in found:
        raise ValueError(f"{given['page'].file.src_uri} has a formula that was not converted")
    return found
