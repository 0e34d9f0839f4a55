"""What backend=None takes on a device that is taken for a GPU, by what a check of its kernels finds."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fishleg_fast import FishLeg, GaussianLikelihood
from fishleg_fast.backends import reference, registry
from fishleg_fast.selfcheck import cache, conversation, dispatch, examination
from fishleg_fast.selfcheck.families import ComposedOps
from fishleg_fast.selfcheck.tuning.table import Tune, save
from fishleg_fast.selfcheck.verdict import Finding
from support import faulty_ops
from support.blocks import make_blocks
from support.dense import randn

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def chosen(precision: str | None = "high", dtype: torch.dtype = torch.float32) -> tuple[str, object]:
    return registry.choose(None, CPU, dtype, precision)


def test_a_device_that_passes_takes_its_kernels(gpu, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By a real child process; the next optimizer and the next process ask none."""
    gpu(triton="RIGHT", cuda="WRONG")
    with caplog.at_level(logging.INFO, "fishleg_fast"), warnings.catch_warnings():
        warnings.filterwarnings("error", ".*'triton'")
        with pytest.warns(UserWarning, match="'cuda' qv is wrong") as told:
            name, ops = chosen("highest")
    assert len(told) == 1 and "qv by triton" in str(told[0].message) and "--check" in str(told[0].message)
    assert name == "triton" and ops is faulty_ops.RIGHT
    told = [record.message for record in caplog.records]
    assert len(told) == 2 and told[0].startswith("checking triton, cuda on cpu")
    assert "backend 'triton' on cpu, checked at precision 'highest'" in told[1]
    assert "qv wrong" in told[1] and "triton: refresh " in told[1] and "e-0" in told[1]
    assert len(list(folder.iterdir())) == 1


def test_an_optimizer_takes_them_and_steps(gpu, checks) -> None:
    gpu(triton="RIGHT")
    model = nn.Linear(3, 2)
    opt = FishLeg(model, likelihood=GaussianLikelihood())
    assert opt.backend == "triton" and opt._ops is faulty_ops.RIGHT
    model(torch.ones(4, 3)).square().sum().backward()
    opt.step()
    assert opt.diagnostics()["steps"] == 1


def test_what_fails_falls_back_op_by_op_with_one_warning(gpu, checks) -> None:
    gpu(triton="RIGHT")
    checks[1].update({("triton", "spectral"): "gave no answer within 120 s", ("triton", "qv"): "raised OSError: no"})
    with pytest.warns(UserWarning, match="failed their check") as told:
        name, ops = chosen()
    assert len(told) == 1 and told[0].filename == __file__.replace(".pyc", ".py")
    text = str(told[0].message)
    for part in (
        "'triton' spectral gave no answer within 120 s", "'triton' qv raised OSError: no", "spectral by reference",
        "qv by reference", "report",
    ):  # fmt: skip
        assert part in text
    assert name == "triton+reference" and isinstance(ops, ComposedOps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen()[0] == name, "and no other warning"


def test_the_next_backend_comes_before_the_reference(gpu, checks) -> None:
    gpu(triton="RIGHT", cuda="WRONG")
    checks[1]["triton", "qv"] = "is wrong"
    with pytest.warns(UserWarning, match="qv by cuda"):
        name, ops = chosen()
    assert name == "triton+cuda"
    blocks = make_blocks()
    us = [randn(*b.shape, dtype=torch.float64) for b in blocks]
    assert torch.equal(ops.qv(blocks, us)[0], 1.01 * reference.qv(blocks, us)[0])


def test_what_is_right_alone_and_wrong_together_is_not_taken(gpu, checks) -> None:
    gpu(triton="RIGHT")
    checks[1]["together", "together"] = "is wrong in case 'odd'"
    with pytest.warns(UserWarning, match="'together' together is wrong in case 'odd'"):
        assert chosen() == ("reference", reference)


def test_the_cache_answers_the_next_process(gpu, checks, new_process, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(triton="RIGHT")
    chosen(), chosen()
    new_process()
    chosen()
    assert checks[0] == [("high", "triton")]
    chosen("medium"), chosen(dtype=torch.bfloat16)  # another precision, and other parameters
    assert checks[0] == [("high", "triton"), ("medium", "triton"), ("high", "triton")]
    new_process()
    monkeypatch.setattr(dispatch, "identity", lambda device: {"device": "the same", "driver": "another"})
    chosen()
    assert len(checks[0]) == 4


def test_faults_are_kept_and_told_in_the_next_process_too(gpu, checks, new_process) -> None:
    gpu(triton="RIGHT")
    checks[1]["triton", "qv"] = "died of SIGSEGV"
    for _ in range(2):
        new_process()
        with pytest.warns(UserWarning, match="'triton' qv died of SIGSEGV"):
            assert chosen()[0] == "triton+reference"
    assert len(checks[0]) == 1


@pytest.mark.parametrize("broken", ["off", "corrupted", "unwritable"])
def test_without_a_cache_each_process_checks(
    gpu, checks, new_process, folder: Path, monkeypatch: pytest.MonkeyPatch, broken: str, caplog
) -> None:
    gpu(triton="RIGHT")
    if broken == "off":
        monkeypatch.setenv(cache.VARIABLE, "off")
    elif broken == "unwritable":
        folder.parent.mkdir(parents=True)
        folder.write_text("")  # no folder, which not even root can write into
    for count in (1, 2):
        new_process()
        caplog.clear()
        assert (chosen(), chosen())[0][0] == "triton"
        assert len(checks[0]) == count
        told = [record.message for record in caplog.records if record.levelno == logging.WARNING]
        if broken == "corrupted":
            assert len(told) == count - 1
            next(folder.iterdir()).write_text("{")
        else:
            assert len(told) == (broken == "unwritable")
    assert (broken == "corrupted") == folder.is_dir()


def test_where_no_child_can_be_started_the_reference_is_taken_and_it_is_told(
    gpu, new_process, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(triton="RIGHT")
    with monkeypatch.context() as patch:
        patch.setattr(conversation.spawn, "get_executable", lambda: None)
        with pytest.warns(UserWarning, match="cannot be checked on cpu, so the reference.*this program is not"):
            assert chosen() == ("reference", reference)
    assert not folder.exists(), "another process may be able to"


def test_a_child_that_cannot_be_started_again_leaves_nothing_half_checked(
    gpu, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that refreshes has died, and there is no other: the rest would be right, for all that is known."""
    gpu(triton="DYING", cuda="RIGHT")
    real = conversation.spawn.get_executable
    programs = [real(), None]
    monkeypatch.setattr(conversation.spawn, "get_executable", lambda: programs.pop(0))
    with pytest.warns(UserWarning, match="cannot be checked on cpu, so the reference computes"):
        assert chosen() == ("reference", reference)
    assert not programs and not folder.exists()


def test_a_lack_of_memory_is_not_kept(gpu, new_process, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(triton="RIGHT")
    lack = {"fault": "found too little memory", "lasting": False}
    monkeypatch.setattr(conversation.Conversation, "__init__", lambda self, request: setattr(self, "over", False))
    monkeypatch.setattr(conversation.Conversation, "ask", lambda self, item: dict(lack))
    monkeypatch.setattr(conversation.Conversation, "end", lambda self: None)
    with pytest.warns(UserWarning, match="too little memory"):
        assert chosen()[0] == "reference"
    assert not folder.exists()


def test_a_named_backend_is_neither_checked_nor_replaced(gpu, checks) -> None:
    gpu(triton="WRONG")
    checks[1]["triton", "qv"] = "is wrong"
    assert registry.choose("triton", CPU, torch.float32, "high") == ("triton", faulty_ops.WRONG)
    assert registry.choose("reference", CPU, torch.float32)[1] is reference
    assert not checks[0]


def test_what_is_unavailable_is_not_checked(gpu, checks) -> None:
    gpu(triton="RIGHT")
    assert chosen(dtype=torch.float64) == ("reference", reference)
    assert not checks[0]


def test_a_tune_decides_between_what_is_right(gpu, checks, new_process) -> None:
    """By family and shape class; without one the order does."""
    gpu(triton="RIGHT", cuda="WRONG")
    assert chosen()[0] == "triton"
    fastest = {"qv": {"small": "cuda", "large": "reference"}, "inner": {}, "lambda_step": {"small": "gone"}}
    save(CPU, Tune(fastest={"high": fastest}))
    new_process()
    name, ops = chosen()
    assert name == "triton+cuda+reference" and len(checks[0]) == 2, "what is used together is checked anew"
    blocks = make_blocks()
    us = [randn(*b.shape, dtype=torch.float64) for b in blocks]
    assert torch.equal(ops.qv(blocks, us)[0], 1.01 * reference.qv(blocks, us)[0])
    assert chosen("medium")[0] == "triton"
    checks[1]["cuda", "qv"] = "is wrong"
    new_process()
    for file in cache.folder().glob("verdict*"):
        file.unlink()
    with pytest.warns(UserWarning):
        assert chosen()[0] == "triton+reference"


INTERPRETED = """
import torch
from torch import nn
from fishleg_fast import FishLeg, GaussianLikelihood
from fishleg_fast.backends import registry
from fishleg_fast.selfcheck import examination
row = registry.BACKENDS["triton"]._replace(kinds=("cpu",), place="support.interpreted_triton:OPS")
registry.BACKENDS = {"triton": row, "reference": registry.BACKENDS["reference"]}
examination.SCALES["cpu"] = "least"
model = nn.Linear(3, 2)
opt = FishLeg(model, likelihood=GaussianLikelihood(), init="sgd", anchor_every=0)
model(torch.ones(4, 3)).square().sum().backward()
opt.step()
print(opt.backend, opt._ops.__name__, opt.diagnostics()["steps"])
"""


def test_the_triton_kernels_pass(tmp_path: Path) -> None:
    """In Triton's interpreter, on a CPU that is taken for the device: backend=None takes them."""
    pytest.importorskip("triton")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"TRITON_INTERPRET": "1", cache.VARIABLE: str(tmp_path), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:__main__", "-c", INTERPRETED],
        env={**os.environ, **settings}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.split() == ["triton", "fishleg_fast.kernels.backend", "1"], done.stderr[-3000:]
    assert len(list(tmp_path.glob("verdict-*.json"))) == 1


def test_what_is_wrong_for_some_of_the_parameters_is_taken_for_none(
    gpu, checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float32 model with bfloat16 layers: its kernels are checked for both; there are none for float64."""
    gpu(triton="RIGHT")
    family = examination.Examination.family

    def only_float32(self: examination.Examination, backend: str, name: str, precision: str) -> Finding:
        found = family(self, backend, name, precision)
        bad = self.subject.dtype == torch.bfloat16 and name == "qv"
        return replace(found, fault="is wrong") if bad else found

    monkeypatch.setattr(examination.Examination, "family", only_float32)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4).double(), nn.Linear(4, 2).bfloat16())
    with pytest.warns(UserWarning, match="'triton' qv is wrong"):
        optimizer = FishLeg(net, likelihood=GaussianLikelihood(), init="sgd", anchor_every=0)
    assert optimizer.backend == "triton+reference" and len(checks[0]) == 2
    assert FishLeg(nn.Linear(3, 4), likelihood=GaussianLikelihood()).backend == "triton"
