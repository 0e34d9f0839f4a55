"""Counts of what λ takes, against what an optimizer of the same model allocates and multiplies."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fishleg_fast import CategoricalLikelihood, FishLeg
from fishleg_fast.__main__ import estimated
from fishleg_fast.algebra.costs import affordable_layout
from support.dense import randn


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 5))


def words() -> nn.Module:
    return nn.Sequential(nn.Embedding(50, 6), nn.Linear(6, 7), nn.LayerNorm(7), nn.Flatten(), nn.Linear(28, 5))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "convolutional": (convolutional, lambda: randn(4, 3, 8, 8, dtype=torch.float32)),
    "words": (words, lambda: torch.arange(16).reshape(4, 4)),
}


@pytest.mark.parametrize("options", [{}, {"structure": "sumkron"}, {"structure": "diagkron"}, {"structure": "diagonal"},
                                     {"max_factor_size": 20}, {"max_factor_size": None}], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", MODELS)
def test_state_is_what_an_optimizer_keeps(name: str, options: dict) -> None:
    make, batch = MODELS[name]
    model, x = make(), batch()
    optimizer = FishLeg(model, likelihood=CategoricalLikelihood(), backend="reference", **options)
    nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
    optimizer.step()
    found = FishLeg.estimate(make(), **options)
    assert [b.name for b in found.blocks] == [b.name for b in optimizer.blocks]
    for got, block in zip(found.blocks, optimizer.blocks, strict=True):
        tensors = [block.momentum, *block.structure.fishleg_aux.values(), *block.exp_avg.values()]
        tensors += [*block.exp_avg_sq.values(), *block.moments.values()]
        learned = got.learning_bytes if options.get("structure") in ("sumkron", "diagkron") else 0
        assert got.state_bytes + learned == sum(t.numel() * t.element_size() for t in tensors), got.name
        if options.get("structure") not in ("sumkron", "diagkron"):
            block.structure.refresh()  # what would not pay for itself in a few steps, too
            dense = [t for t in block.structure.cache.values() if t.ndim > 1]
            assert got.cache_bytes == sum(t.numel() * t.element_size() for t in dense), got.name
        assert got.layout == block.structure.layout() and got.shape == block.shape
    assert found.total("state_bytes") == sum(b.state_bytes for b in found.blocks)


def test_operations_of_a_step() -> None:
    """Q m of dense factors: torch counts the same products."""
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 5))
    optimizer = FishLeg(model, likelihood=CategoricalLikelihood(), backend="reference", normalize="rms",
                        thin_gradients=False, step_limit=None)  # fmt: skip
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(randn(8, 20, dtype=torch.float32)), torch.arange(8) % 5).backward()
        if optimizer.diagnostics()["steps"]:
            with FlopCounterMode(display=False) as counter:
                optimizer.step()
        else:
            optimizer.step()
    found = FishLeg.estimate(model)
    assert counter.get_total_flops() == found.total("step_flops")
    average = found.flops_per_step(anchor_every=10, update_aux_every=0, spectral=False)
    assert average == found.total("step_flops") + found.total("anchor_flops") / 10
    assert found.flops_per_step(0, -2, False) == found.total("step_flops") + 2 * found.total("learning_flops")


def test_sums_of_products_are_counted_too() -> None:
    layer = nn.Linear(60, 50)
    one, two = FishLeg.estimate(layer), FishLeg.estimate(layer, structure="sumkron")
    for name in ("step_flops", "anchor_flops", "cache_bytes"):
        assert 1.9 * one.total(name) < two.total(name) < 2.1 * one.total(name), name


def test_nothing_is_allocated() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(50_000, 4096), nn.Linear(4096, 11008), nn.Linear(11008, 50_000))
    found = FishLeg.estimate(model)
    assert found.total("state_bytes") > 2**30 and found.parameters == sum(p.numel() for p in model.parameters())
    text = str(found)
    assert text.count("\n") == 5 and "L dense 4097 × 4097" in text and "all" in text


def test_a_vocabulary_is_diagonal_and_a_long_side_in_parts() -> None:
    assert affordable_layout(5000, 33) == (("R",), 1024)
    assert affordable_layout(33, 5000) == (("L",), 1024)
    assert affordable_layout(128, 1153) == ((), 1024)
    assert affordable_layout(512, 2049) == ((), 2048) and affordable_layout(512, 2048) == ((), 2048)
    assert affordable_layout(4096, 16384) == ((), 8192)
    for m, n in [(1, 1), (7, 900), (5000, 33), (33, 5000), (128, 1153), (3000, 3000), (20_000, 20_000), (10**6, 8)]:
        diagonal, limit = affordable_layout(m, n)
        entries = sum(0 if side in diagonal else k * min(k, limit) for side, k in (("R", m), ("L", n)))
        assert entries <= max(6 * m * n, 5 * 1024**2)
    net = nn.Sequential(nn.Linear(32, 5000), nn.Linear(5000, 3))
    optimizer = FishLeg(net, likelihood=CategoricalLikelihood())
    factors = optimizer.diagnostics()["factors"]
    assert factors == {
        "0": {"R": "diagonal 5000", "L": "dense 33 × 33"}, "1": {"R": "dense 3 × 3", "L": "diagonal 5001"},
    }  # fmt: skip


@pytest.mark.parametrize(
    "where,told",
    [("torch.nn:Identity", "0 parameters"), ("torch.nn", "package.module:model"), ("nowhere:x", "nowhere"),
     ("torch:nothing", "nothing"), ("builtins:int", "int")],
)  # fmt: skip
def test_command_line(where: str, told: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fishleg_fast", "--estimate", where], capture_output=True, text=True, check=False
    )
    assert told in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert (done.returncode == 0) == (where == "torch.nn:Identity")


MODULE = """
import torch
from torch import nn

class Made(nn.Module):
    net = nn.Linear(3, 2)

def sized(n, m, k=1):
    return nn.Linear(n, m)

def fails():
    raise LookupError("no such weights")

number = 3
lazy = nn.LazyLinear(3)
"""


@pytest.mark.parametrize(
    "where, told",
    [("models:sized", "needs: n, m"), ("models:fails", "LookupError: no such weights"), ("models:number", "is: 3"),
     ("models:nothing.net", "nothing"), ("models:", "package.module:model"), (":net", "package.module:model"),
     ("models:lazy", "parameter 'weight' is not initialized yet"), ("broken:net", "ZeroDivisionError"),
     ("models:Made.net", None)],
)  # fmt: skip
def test_command_line_tells_of_what_is_no_model(
    where: str, told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("models", "broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    if told is None:
        assert "8 parameters" in estimated(where)
    else:
        with pytest.raises(SystemExit, match=rf"--estimate .*{re.escape(told)}"):
            estimated(where)


@pytest.mark.parametrize(
    "arguments, error, told",
    [({"model": 5}, TypeError, "model should be an nn.Module but is: 5"),
     ({"structure": "x"}, ValueError, "structure should be one of .* but is: 'x'"),
     ({"structure": {"*": "x"}}, ValueError, "structure should be one of .* but is: 'x'"),
     ({"max_factor_size": 0}, ValueError, "max_factor_size should be .* but is: 0"),
     ({"max_factor_size": "x"}, ValueError, "max_factor_size should be .* but is: 'x'"),
     ({"model": nn.LazyConv2d(3, 3)}, ValueError, "parameter 'weight' is not initialized yet: run one forward pass")],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments: dict, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        FishLeg.estimate(**{"model": nn.Linear(3, 2), **arguments})


@pytest.mark.parametrize("problem", ["resnet", "mlp"])
def test_no_more_is_kept_than_it_says(problem: str) -> None:
    """In a process of its own: what lives between steps, whatever keeps it."""
    code = (
        "from benchmarks.study.state_memory import state_bytes; from benchmarks.study.problems import PROBLEMS\n"
        "from fishleg_fast import FishLeg\n"
        f"kept = FishLeg.estimate(PROBLEMS[{problem!r}].make().make_model()).kept\n"
        f"print(state_bytes({problem!r}, 'fishleg', steps=2)['bytes'] / kept)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 0.3 < float(found) < 1.1
