"""``python -m fishleg_fast --check`` and ``--tune``, on a device that is taken for a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fishleg_fast.__main__ as command_line
from fishleg_fast.backends import registry
from fishleg_fast.kernels.host import configurations
from fishleg_fast.kernels.host.configurations import TILES, Tile
from fishleg_fast.precision import PRECISIONS
from fishleg_fast.selfcheck import cache, command, conversation, examination
from fishleg_fast.selfcheck.families import FAMILIES, SHAPE_CLASSES, shape_class
from fishleg_fast.selfcheck.tuning import search, timing
from fishleg_fast.selfcheck.tuning.table import Tune, tune_of
from support import faulty_ops

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configurations, "_TUNED", {})


def test_a_check_prints_every_op_at_every_precision(gpu, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a real child process; then optimizers need none."""
    gpu(triton="RIGHT")
    assert command_line.main(["--check"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:3] for row in rows] == [
        row for p in PRECISIONS for row in [*(["triton", f, p] for f in FAMILIES), ["together", "together", p]]
    ]
    assert all(row[-1] == "right" and 0 < float(row[3]) <= float(row[5]) for row in rows)
    assert len(list(folder.iterdir())) == len(PRECISIONS)


def test_what_is_wrong_is_printed_and_the_exit_status(gpu, checks, capsys: pytest.CaptureFixture[str]) -> None:
    gpu(triton="RIGHT", cuda="RIGHT")
    checks[1]["cuda", "spectral"] = "died of SIGSEGV"
    assert command_line.main(["--check"]) == 1
    out = capsys.readouterr().out
    assert out.count("died of SIGSEGV") == len(PRECISIONS)
    assert len([line for line in out.splitlines() if line.startswith("cuda")]) == len(PRECISIONS) * len(FAMILIES)
    with pytest.warns(UserWarning, match="SIGSEGV"):
        assert {registry.choose(None, CPU, torch.float32, p)[0] for p in PRECISIONS} == {"triton"}
    assert len(checks[0]) == len(PRECISIONS), "the optimizers asked for no other check"


def test_a_check_reads_no_verdict(gpu, checks, new_process) -> None:
    gpu(triton="RIGHT")
    assert command_line.main(["--check"]) == 0
    checks[1]["triton", "qv"] = "is wrong"
    assert command_line.main(["--check"]) == 1
    new_process()
    with pytest.warns(UserWarning, match="qv is wrong"):
        assert registry.choose(None, CPU, torch.float32, "high")[0] == "triton+reference"


def test_a_check_without_a_child_process_fails(gpu, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    gpu(triton="RIGHT")
    monkeypatch.setattr(conversation.spawn, "get_executable", lambda: None)
    assert command_line.main(["--check"]) == 1
    assert "cannot be checked: this program is not run by a Python" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_why_and_checks_what_there_is(
    monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(examination.SCALES, "cpu", "least")
    assert command_line.main(["--check"]) == 0
    out = capsys.readouterr().out
    assert "triton is not checked: " in out and "cuda is not checked: " in out
    assert len([line for line in out.splitlines() if line.startswith("cpp")]) == len(PRECISIONS) * len(FAMILIES)
    assert not folder.exists(), "what needs no check has no verdict"
    assert command_line.main(["--tune"]) == 1
    assert "nothing to tune on cpu" in capsys.readouterr().out


def test_precisions_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line.main(["--tune", "double"])
    assert "double" in capsys.readouterr().err


BEST = Tile(128, 64, 64, 8, 4)


def test_the_fastest_tile_is_found_by_trying_few(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Tile] = []

    def clock(call) -> float:
        (tile,) = {tile for rows in configurations._TUNED[80].values() for tile in rows.values()}
        tried.append(tile)
        if tile.num_stages == 3 and tile.BM == 256:
            raise RuntimeError("out of resource: shared memory")
        return 1.0 + sum(abs(x - y) for x, y in zip(tile, BEST, strict=True))

    monkeypatch.setattr(timing, "tile_call", lambda *args: None)
    found = search.fastest_tile("large", "tf32", CPU, faulty_ops.RIGHT, clock)
    assert found == (BEST, 1.0) and len(tried) == len(set(tried)) < 20
    assert configurations.tile("large", "tf32", 80) == TILES["large"]["tf32"][80], "nothing is left in use"
    assert search.fastest_tile("large", "tf32", CPU, faulty_ops.RIGHT, lambda call: 1.0) is None, "none is faster"


def test_the_row_that_is_timed_is_in_use_for_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def clock(call) -> float:
        seen.append({row: configurations.tile(row, "tf32", 80) for row in TILES})
        return 1.0

    monkeypatch.setattr(timing, "tile_call", lambda *args: None)
    for shape in ("small", "epilogue"):
        list(search.times_of_tiles(shape, "tf32", CPU, faulty_ops.RIGHT, [BEST], clock))
    assert seen[0] == dict.fromkeys(TILES, BEST)
    assert seen[1] == {**{row: TILES[row]["tf32"][80] for row in TILES}, "epilogue": BEST}


def test_a_tune_is_kept_and_used(gpu, checks, new_process, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    """cuda is half as slow in every op but is wrong in Q u; the reference is fastest on large blocks."""
    gpu(triton="RIGHT", cuda="RIGHT")
    checks[1]["cuda", "qv"] = "is wrong"
    now: list[str] = []
    monkeypatch.setattr(timing, "CLASS_LAYERS", {"small": [(3, 4)], "medium": [(300, 2)], "large": [(1, 2), (3, 4)]})
    monkeypatch.setattr(search, "fastest_tile", lambda shape, *args: (BEST, 1e-3) if shape == "small" else None)

    def calls(blocks, ops, capturable=False):
        name = {id(faulty_ops.RIGHT): "kernels"}.get(id(ops), "reference")
        size = {1: "small", 2: "large"}[len(blocks)] if blocks[0].shape != (300, 2) else "medium"
        return dict.fromkeys(timing.TIMED, (name, size))

    times = iter(range(10**6))
    monkeypatch.setattr(timing, "calls", calls)

    def clock(call) -> float:
        now.append(call)
        name, size = call
        kernels = 2.0 if next(times) % 2 else 1.0
        return {"reference": 0.1 if size == "large" else 9.0}.get(name, kernels)

    monkeypatch.setattr(search.fastest_backends, "__defaults__", (clock,))
    assert command_line.main(["--tune"]) == 0
    out = capsys.readouterr().out
    assert "kept in" in out and "at precisions high" in out
    table = tune_of(CPU)
    assert table.tiles == {"small": {"tf32": list(BEST)}}
    assert set(table.fastest) == {"high"} and table.fastest["high"]["qv"]["small"] == "triton"
    assert all(by["large"] == "reference" for by in table.fastest["high"].values())
    assert set(table.fastest["high"]) == set(timing.TIMED) and len(now) == 3 * (5 + 4 + 5)
    new_process()
    configurations.tune(80, {})
    with pytest.warns(UserWarning, match="is wrong"):
        name, _ = registry.choose(None, CPU, torch.float32, "high")
    assert "reference" in name and configurations.tile("small", "tf32", 80) == BEST
    assert configurations.tile("small", "ieee", 80) == TILES["small"]["ieee"][80]


def test_tiles_with_which_kernels_are_wrong_are_left_out(gpu, checks, monkeypatch, capsys) -> None:
    gpu(triton="RIGHT")
    monkeypatch.setattr(search, "fastest_tile", lambda shape, *args: (BEST, 1e-3))
    monkeypatch.setattr(search, "fastest_backends", lambda *args, **options: Tune())
    real = examination.Examination.family

    def family(self, backend, name, precision):
        found = real(self, backend, name, precision)
        return found if not self.subject.tiles else found.__class__(**{**found.__dict__, "fault": "is wrong"})

    monkeypatch.setattr(examination.Examination, "family", family)
    assert command_line.main(["--tune", "high", "highest"]) == 0
    assert "the tuned tiles are left out" in capsys.readouterr().out
    assert tune_of(CPU).tiles == {}


def test_without_a_cache_there_is_no_tuning(gpu, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    gpu(triton="RIGHT")
    monkeypatch.setenv(cache.VARIABLE, "off")
    assert command.tune({"triton": "support.faulty_ops:RIGHT"}, CPU, ["high"], print) is False
    assert cache.VARIABLE in capsys.readouterr().out


def test_what_is_timed_runs() -> None:
    """Each call does its op, whatever was called before; and layers are of the class that they are to tell."""
    for kind, shapes in timing.CLASS_LAYERS.items():
        most = list(SHAPE_CLASSES.values())
        side = max(min(shape) for shape in shapes)
        assert side <= SHAPE_CLASSES[kind] and all(side > m for m in most if m < SHAPE_CLASSES[kind])
    with torch.no_grad():
        blocks = timing.layers([(3, 4), (5, 2)], CPU)
        assert [b.shape for b in blocks] == [(3, 4), (5, 2)] and shape_class(blocks) == "small"
        for name, call in timing.calls(blocks, faulty_ops.RIGHT).items():
            before = [b.structure.version for b in blocks]
            call()
            assert (before != [b.structure.version for b in blocks]) == (name in ("refresh", "lambda_step"))
        assert timing.seconds(lambda: None, repeats=3) >= 0
    assert all(b.structure.fishleg_aux["R"].isfinite().all() for b in blocks)


def test_merged_tables_keep_what_is_not_new() -> None:
    old = Tune({"small": {"tf32": [1, 1, 1, 1, 1], "ieee": [2, 2, 2, 2, 2]}}, {"high": {}, "medium": {}}, {"a": 1.0})
    new = Tune({"small": {"tf32": [3, 3, 3, 3, 3]}, "large": {}}, {"high": {"qv": {"small": "cuda"}}}, {"b": 2.0})
    assert search.merged(old, new) == Tune(
        {"small": {"tf32": [3, 3, 3, 3, 3], "ieee": [2, 2, 2, 2, 2]}, "large": {}},
        {"high": {"qv": {"small": "cuda"}}, "medium": {}},
        {"a": 1.0, "b": 2.0},
    )
