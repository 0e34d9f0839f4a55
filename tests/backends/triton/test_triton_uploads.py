"""Tables and schedules of the Triton backend: found again without being made again, by each stream apart."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from fishleg_fast.kernels.host.tables import streams, uploads
from fishleg_fast.kernels.host.tables.uploads import Tiles, Uploads, schedule, tiles, upload, upload_rows

CPU = torch.device("cpu")


def enumerated(shapes: list, bm: int, bn: int, half: bool, numbered: bool) -> list[tuple[int, ...]]:
    found = []
    for row, m, n, extra in shapes:
        corners = [(i, j) for i in range(0, m, bm) for j in range(0, n, bn)]
        corners = [(i // bm, j // bn) for i, j in corners if not half or j // bn <= i // bm]
        found += [(row, i, j, extra + (k if numbered else 0)) for k, (i, j) in enumerate(corners)]
    return found


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_tiles(half: bool, numbered: bool) -> None:
    shapes = [(0, 1, 1, 5), (3, 33, 70, 0), (1, 16, 64, 1 << 20), (2, 65, 1, 2)]
    if half:  # of square matrices and tiles
        shapes = [(row, m, m, extra) for row, m, _, extra in shapes]
    sides = (16, 16) if half else (16, 64)
    once, other = tiles(shapes, *sides, half, numbered), tiles(shapes[:1], 8, 8)
    want = enumerated(shapes, *sides, half, numbered)
    for found, entries in ((once, want), (once + other, want + enumerated(shapes[:1], 8, 8, False, False)), ((), [])):
        if found:
            device_entries, count = schedule(found, CPU)
            assert device_entries.dtype == torch.int32 and count == len(entries)
            assert [tuple(e) for e in device_entries.tolist()] == entries


@pytest.mark.parametrize(
    "values, dtype",
    [
        ([2**62 + 1, -3, 0], torch.int64),
        ([7, -1], torch.int32),
        ([0.1, -math.inf, 3, 1e-30], torch.float32),
        ([], torch.int64),
    ],
)
def test_values(values: list, dtype: torch.dtype) -> None:
    found = upload(values, dtype, CPU)
    assert torch.equal(found, torch.tensor(values, dtype=dtype)) and found.dtype == dtype
    assert upload_rows([values, values], dtype, CPU).tolist() == 2 * torch.tensor(values, dtype=dtype).tolist()
    assert upload(tuple(values), dtype, CPU) is found
    assert upload([0], torch.int32, CPU) is not upload([0], torch.float32, CPU)


def test_what_was_made_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does looking it up look at each tile: the key has a few numbers for each matrix."""
    shapes = [(k, 1, 768 * 3072, 0) for k in range(148)]
    first, count = schedule(tiles(shapes, 1, 4096), CPU)
    assert count == 148 * 576 == len(first)
    monkeypatch.setattr(Tiles, "entries", lambda self: pytest.fail("made again"))
    found = tiles(shapes, 1, 4096)
    assert schedule(found, CPU)[0] is first and sum(len(some.shapes) for some in found) == 148


def test_each_stream_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    order = iter([1, 2, 1, 2, 3])
    monkeypatch.setattr(streams, "stream_of", lambda device: next(order))
    kept, made = Uploads(1 << 20), []

    def make() -> Tensor:
        made.append(torch.arange(4))
        return made[-1]

    a, b, again, b_again, c = (kept.get("key", CPU, make) for _ in range(5))
    assert a is again and b is b_again and len({id(t) for t in (a, b, c)}) == 3 == len(made)


class Capturing:
    """Stands in for a device whose graph is being captured."""

    type = "cuda"


def test_a_captured_graph_takes_what_is_there_and_leaves_nothing_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    order, on = iter([1, 2, 2, 2]), iter([False, True, True, True])
    monkeypatch.setattr(streams, "stream_of", lambda device: next(order))
    monkeypatch.setattr(uploads, "sent", lambda host, device: host.clone())
    state = [False]
    monkeypatch.setattr(streams, "capturing", lambda: state[0])
    monkeypatch.setattr(streams, "_captured", {})
    kept, gpu = Uploads(1 << 20), Capturing()

    def get(key: str) -> Tensor:
        state[0] = next(on)
        return kept.get(key, gpu, lambda: torch.zeros(3))

    before = get("known")
    assert get("known") is before and len(streams._captured) == 1
    new, newer = get("new"), get("new")
    assert new is not newer and len(kept) == 1  # memory of the graph's pool
    held = {id(t) for used in streams._captured.values() for t in used}
    assert {id(before), id(new), id(newer)} == held
    state[0] = True
    size = len(streams._captured)
    streams.keep(before), streams.keep(before)
    assert len(streams._captured) == size


def test_only_so_many_bytes_are_kept() -> None:
    kept = Uploads(1000)
    for k in range(100):
        kept.get(k, CPU, lambda: torch.zeros(25))
    assert len(kept) == 10
    latest = kept.get(99, CPU, lambda: pytest.fail("made again"))
    kept.get("large", CPU, lambda: torch.zeros(10_000))
    assert len(kept) == 1 and latest.sum() == 0


def test_threads_share_them() -> None:
    kept = Uploads(8 * 40)

    def work(seed: int) -> bool:
        order = torch.randperm(2000, generator=torch.Generator().manual_seed(seed)).tolist()
        return all(kept.get(k % 60, CPU, lambda k=k: torch.tensor([k % 60])) == k % 60 for k in order)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert len(kept) == 40 and kept._bytes == 8 * 40
