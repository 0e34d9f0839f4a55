"""Every block of Python in docs/ runs, a page's in one namespace, and prints what the page says that it prints."""

from __future__ import annotations

import importlib.util
import io
import linecache
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from docs.pages import DOCS, PAGES, ROOT, Block, agrees, blocks
from fishleg_fast.backends.registry import BACKENDS
from fishleg_fast.fisher.products import FISHER
from fishleg_fast.model.assemble import STRUCTURES
from fishleg_fast.model.layers import LAYERS

TABLES: list[dict[Any, Any]] = [BACKENDS, FISHER, LAYERS, STRUCTURES]
CHECKED = [page for page in PAGES if blocks(page.read_text(encoding="utf-8"))]


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own to write to and import from; tables of the library and torch's settings as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    modules, tables = set(sys.modules), [(table, dict(table)) for table in TABLES]
    precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    yield
    for table, before in tables:
        table.clear()
        table.update(before)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    torch.set_float32_matmul_precision(precision)
    torch.set_default_dtype(dtype)


def run(page: str, name: str) -> None:
    """Run its blocks; AssertionError where one prints something else."""
    space = {"__name__": "__main__"}
    for block in blocks(page):
        place = f"{name}, line {block.line}"
        if any(importlib.util.find_spec(module) is None for module in block.needs):
            continue
        if block.file is not None:
            Path(block.file).write_text(block.code, encoding="utf-8")
            continue
        printed = by_ranks(block) if block.ranks else here(block, place, space)
        assert block.prints is None or agrees(printed, block.prints), (
            f"{place}: printed\n{printed}\nwhere the page says\n{block.prints}"
        )


def here(block: Block, place: str, space: dict[str, Any]) -> str:
    """What it prints, run in a namespace."""
    linecache.cache[place] = len(block.code), None, block.code.splitlines(keepends=True), place  # inspect, traces
    printed = io.StringIO()
    with redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exec(compile(block.code, place, "exec"), space)
    return printed.getvalue()


def by_ranks(block: Block) -> str:
    """What it prints, run by processes with a thread each, from this folder."""
    Path("train.py").write_text(block.code, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={block.ranks}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "train.py"], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", CHECKED, ids=[str(page.relative_to(DOCS)) for page in CHECKED])
def test_blocks_of_a_page_run(page: Path) -> None:
    run(page.read_text(encoding="utf-8"), str(page.relative_to(DOCS)))


def test_most_pages_have_blocks() -> None:
    assert len(CHECKED) >= 10


def test_what_raises_warns_or_prints_something_else_fails() -> None:
    fence = "```"
    page = f"<!-- prelude\nn = 2\n-->\n\n{fence}python\nprint('n is', n / 3)\n{fence}\n\n"
    said = f'{fence}text title="prints"\nn is 0.667\n{fence}\n'
    run(page + said, "page")
    for wrong in (said.replace("n is", "m is"), said.replace("0.667", "1.5"), said.replace("0.667", "0.667 1")):
        with pytest.raises(AssertionError, match="where the page says"):
            run(page + wrong, "page")
    with pytest.raises(NameError):
        run(page.replace("n = 2", "m = 2"), "page")
    with pytest.raises(UserWarning, match="two"):
        run(page.replace("n = 2", "import warnings; warnings.warn('two'); n = 2"), "page")
    with pytest.raises(ValueError, match="no block of Python prints this"):
        blocks(said)


def test_integers_should_be_the_same() -> None:
    assert agrees("steps 3, loss 1.01e-3\n", "steps 3, loss 0.00102")
    assert not agrees("steps 3", "steps 4")
    assert not agrees("loss nan", "loss 1.0")
    assert agrees("loss nan", "loss nan")


def test_other_numbers_should_be_near() -> None:
    assert agrees("lr 0.03", "lr 0.01") and not agrees("lr 0.04", "lr 0.01")  # of so few digits
    assert agrees("lr 8.2e-08", "lr 8.0e-08") and not agrees("lr 2.5e-04", "lr 8.0e-08")
    assert agrees("loss 1.40", "loss 1.00") and not agrees("loss 1.60", "loss 1.00") and not agrees("-1.0", "1.0")
