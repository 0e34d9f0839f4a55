"""What kernels can reach by counts: figures counted by hand."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import reach
from benchmarks.gpu.reach import CARDS, Card, Kernel, Product
from benchmarks.gpu.shapes import LISTS
from fishleg_fast.kernels.host.configurations import Tile

SLOW = Card(90, 4, memory=1e3, cache=1e9, flops={"tf32": 1e6})
TILE = Tile(32, 16, 8, 4, 3)


def test_a_product_of_whole_tiles() -> None:
    p = Product(64, 32, 16)
    assert p.tiles(TILE) == 4 and p.flops == p.done(TILE) == 2 * 64 * 32 * 16
    assert p.read(TILE) == 4 * (4 * 32 * 16 + 4 * 16 * 16)


def test_tiles_that_stand_out_are_done_whole() -> None:
    p = Product(33, 17, 9)
    assert p.tiles(TILE) == 4 and p.done(TILE) == 2 * 4 * 32 * 16 * 16


def test_of_a_symmetric_product_half_the_tiles() -> None:
    square = Tile(16, 16, 8, 4, 3)
    p = Product(48, 48, 8, half=True)
    assert p.tiles(square) == 6 and p.flops == 8 * 48 * 49
    assert p.done(square) == 2 * 6 * 16 * 16 * 8


def test_what_takes_longest_counts_and_processors_that_wait_with_it() -> None:
    product = Product(64, 48, 16)  # 6 tiles on 4 processors: two rounds
    kernel = Kernel("k", [product], TILE, memory=4.0)
    seconds, why = kernel.counted(SLOW, "tf32")
    assert seconds == pytest.approx(product.flops / 1e6 * 8 / 6) and why == "FLOPs, processors idle 25%"
    assert kernel.floor(SLOW, "tf32") == pytest.approx(product.flops / 1e6)
    starved = Kernel("k", [product], TILE, memory=1e6)
    assert starved.counted(SLOW, "tf32") == (1e3, "memory") and starved.floor(SLOW, "tf32") == 1e3
    cached = Kernel("k", [product], TILE, memory=0.0)
    assert cached.counted(SLOW._replace(cache=1.0), "tf32") == (product.read(TILE), "L2")


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3", "bf16"])
@pytest.mark.parametrize("card", CARDS)
def test_no_kernel_beats_its_floor(card: str, precision: str) -> None:
    for shapes in [*LISTS.values(), [(1, 1)], [(1000, 3)]]:
        for kernel in reach.kernels(shapes, precision, CARDS[card]):
            least, (counted, _) = kernel.floor(CARDS[card], precision), kernel.counted(CARDS[card], precision)
            assert 0 < least <= counted * (1 + 1e-12), kernel.name


def test_the_command_prints_a_table_for_each_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert reach.main(["--list", "ResNet18", "--card", "A100", "--precision", "medium"]) == 0
    text = capsys.readouterr().out
    assert "nothing here was measured" in text and text.count("polar: BX") == 1 and "## ResNet18" in text
