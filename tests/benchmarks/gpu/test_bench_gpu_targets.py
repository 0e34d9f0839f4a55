"""The command for a GPU: targets and checks are judged as they should be."""

import re

from benchmarks.gpu.clock import spread
from benchmarks.gpu.report.targets import failed, targets
from benchmarks.gpu.report.text import render


def test_targets_are_judged_at_the_worst_size_and_only_where_measured():
    one = lambda x: {"call": spread([x])}
    results = {
        "theta/mnist/adamw/highest": one(1.0), "theta/mnist/triton/high": one(2.5),
        "theta/mnist/published/high": one(40.0), "theta/mnist/published/highest": one(60.0),
        "qv/256/triton/high": one(1.0), "qv/256/compiled/high": one(9.0), "qv/256/compiled-graphs/high": one(3.0),
        "qv/512/triton/high": one(1.0), "qv/512/compiled/high": one(2.5),
        "qv/1024/triton/high": one(1.0), "qv/1024/compiled/high": one(0.9),
        "refresh/2048/triton/high": one(9.0), "refresh/2048/mm/high": one(1.0),
        "refresh/4096/triton/high": one(1.0), "refresh/4096/mm/high": one(1.6),
        "refresh/8192/triton/high": {"error": "out of memory"}, "refresh/8192/mm/high": one(10.0),
    }  # fmt: skip
    backends = {n: {"available": True, "why": ""} for n in ("triton", "reference")}
    data = {"results": results, "environment": {"backends": backends}}
    found = [t for t in targets(data) if t["timing"] == "call" and t["precision"] == "high"]
    assert {t["backend"] for t in found} == {"triton"}
    values = [(t["value"], t["at"], t["measured"], t["met"]) for t in found]
    assert values == [
        (2.5, "mnist", "1 of 1", True),
        (16.0, "mnist", "1 of 1", False),
        (24.0, "mnist", "1 of 1", True),  # in float32
        (2.5, "512", "2 of 2", True),  # the faster compiled one counts: 3 at 256
        (0.9, "1024", "3 of 3", False),
        (1.6, "4096", "1 of 2", None),  # good so far, but one size is missing
    ]
    assert all(t["met"] is None for t in targets(data) if t["timing"] == "device")
    text = render(data)
    assert re.search(r"0\.9 at 1024 .* NO \|", text) and "REHEARSAL" not in text


def test_failed_is_a_wrong_check_a_failed_test_or_no_check():
    check = lambda right: {"results": {"check/kron/a/high": {"right": right}}, "tests": {"failed": False}}
    assert not failed(check(True)) and failed(check(False))
    assert failed({"results": {"check/kron/a/high": {"error": "it raised"}}})
    assert failed({"results": {}}) and not failed({"results": {}, "only": ["qv"]})
    assert failed(check(True) | {"tests": {"failed": True}})
