"""The pages of docs/: their blocks of Python, and what the blocks are to print."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))

_PRELUDE = re.compile(r"^<!-- prelude\n(?P<code>.*?)^-->$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- (?:ranks (?P<ranks>\d+)|file (?P<file>\w+\.py)|needs (?P<needs>[\w ]+)) -->\n\Z")
_FENCE = re.compile(r"^(?P<marks>`{3,})(?P<info>[^\n]*)\n(?P<text>.*?)^(?P=marks)[ ]*$", re.MULTILINE | re.DOTALL)
PRINTS = 'text title="prints"'


@dataclass
class Block:
    """Code from line ``line`` of its page on, and what it should print; None: whatever it likes.

    ``ranks``: a script of its own, for so many processes; 0: a part of its page. ``file``: to be written and not run.
    ``needs``: modules without which it is left out.
    """

    code: str
    line: int
    ranks: int = 0
    file: str | None = None
    needs: tuple[str, ...] = ()
    prints: str | None = None


def blocks(page: str) -> list[Block]:
    """The Python of a page in order: what is in its prelude, a comment, before what is shown."""
    found = [Block(m["code"], _line(page, m.start("code"))) for m in _PRELUDE.finditer(page)]
    for fence in _FENCE.finditer(_blanked(page)):
        if fence["info"].strip() == "python":
            mark = _MARK.search(page[: fence.start()])
            found.append(Block(fence["text"], _line(page, fence.start("text"))))
            if mark:
                found[-1].ranks, found[-1].file = int(mark["ranks"] or 0), mark["file"]
                found[-1].needs = tuple((mark["needs"] or "").split())
        elif fence["info"].strip() == PRINTS:
            if not found or found[-1].prints is not None:
                raise ValueError(f"line {_line(page, fence.start())}: no block of Python prints this")
            found[-1].prints = fence["text"]
    return found


def prose(page: str) -> str:
    """The page without its blocks, comments and code in backticks; lines stay where they are."""
    without = _FENCE.sub(lambda m: "\n" * m[0].count("\n"), _blanked(page))
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", without)


def _blanked(page: str) -> str:
    """Without comments, of which spaces are left: every place is where it was."""
    return re.sub(r"<!--.*?-->", lambda m: re.sub(r"[^\n]", " ", m[0]), page, flags=re.DOTALL)


def _line(page: str, place: int) -> int:
    return page.count("\n", 0, place) + 1


_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|\bnan\b|\binf\b", re.IGNORECASE)


def agrees(printed: str, told: str, times: float = 1.5) -> bool:
    """Whether what was printed is what a page says: the same words; integers the same, other numbers as far as another
    processor's rounding may take them, a factor of ``times``, or two units of the last place that the page has.
    """
    shape = lambda text: _NUMBER.sub("#", " ".join(text.split()))
    return shape(printed) == shape(told) and all(
        a == b or (not _WHOLE.fullmatch(b) and _near(a, b, times))
        for a, b in zip(_NUMBER.findall(printed), _NUMBER.findall(told), strict=True)
    )


_WHOLE = re.compile(r"[-+]?\d+|nan|inf")


def _near(printed: str, told: str, times: float) -> bool:
    a, b = float(printed), float(told)
    digits, _, exponent = told.lower().partition("e")
    last = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    return abs(a - b) <= 2.001 * last or (a * b > 0 and 1 / times <= a / b <= times)
