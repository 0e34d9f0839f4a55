"""Where tensors are, and which objects blocks have: the extension's answer changes with torch's and Python's alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("triton")

import torch
from torch import Tensor

from fishleg_fast import Kron, native
from fishleg_fast.kernels.host.tables import places
from fishleg_fast.model.block import Block
from support.blocks import make_block
from support.dense import randn

X = torch.arange(48.0)
LISTS: dict[str, list[Tensor]] = {
    "contiguous": [X.reshape(6, 8), X.reshape(8, 6)],
    "moved": [X[8:32].reshape(6, 4), X.reshape(8, 6)],
    "transposed": [X.reshape(8, 6).T, X.reshape(8, 6)],
    "sliced": [X.reshape(6, 8)[:, :5], X[4]],
    "of another dtype": [X.reshape(6, 8).bfloat16(), X.reshape(8, 6).half()],
    "empty": [X[:0], X.reshape(6, 8)[:, :0]],
    "expanded": [X[0].expand(3, 3)],
    "parameters": [torch.nn.Parameter(torch.ones(3, 2)), torch.ones(2, requires_grad=True)],
    "none": [],
}


@pytest.mark.skipif(not native.available().supported, reason="needs the extension")
@pytest.mark.parametrize("name", LISTS)
def test_addresses_are_torchs(name: str) -> None:
    addresses, lie = places.places(LISTS[name])
    assert isinstance(lie, bytes) and addresses == [t.data_ptr() for t in LISTS[name]]
    assert places.places(list(LISTS[name])) == (addresses, lie)


@pytest.mark.skipif(not native.available().supported, reason="needs the extension")
def test_what_lies_otherwise_for_torch_does_so_for_the_extension() -> None:
    for a in LISTS.values():
        for b in LISTS.values():
            if [t.shape for t in a] == [t.shape for t in b]:
                same = places.by_torch(a)[1] == places.by_torch(b)[1]
                assert (places.places(a)[1] == places.places(b)[1]) == same


def test_what_has_no_memory_is_left_to_torch() -> None:
    with pytest.raises(RuntimeError, match="storage"):
        places.places([torch.ones(2, 2).to_sparse()])
    assert places.places([torch.ones(2, device="meta")])[0] == [0]


def test_without_the_extension_it_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_extension", lambda: None)
    assert places.places(LISTS["sliced"]) == places.by_torch(LISTS["sliced"])


def replace_first(held: dict[str, Tensor]) -> None:
    name = next(iter(held))
    held[name] = held[name].clone()


def append_group(block: Block) -> None:
    block.groups = [*block.groups, {}]


CHANGES: dict[str, Callable[[Block], object]] = {
    "momentum": lambda b: setattr(b, "momentum", b.momentum.clone()),
    "step": lambda b: setattr(b, "step", b.step.clone()),
    "spectral": lambda b: setattr(b, "spectral", not b.spectral),
    "structure": lambda b: setattr(b, "structure", Kron(3, 4)),
    "precision": lambda b: setattr(b.structure, "precision", "bf16"),
    "λ": lambda b: replace_first(b.structure.fishleg_aux),
    "λ's dict": lambda b: setattr(b.structure, "fishleg_aux", dict(b.structure.fishleg_aux)),
    "less of λ": lambda b: b.structure.fishleg_aux.popitem(),
    "a group": lambda b: b.groups.__setitem__(0, dict(b.groups[0])),
    "groups": append_group,
    "a parameter": lambda b: b.params.__setitem__(0, torch.nn.Parameter(b.params[0].detach().clone())),
}
WHEN_LEARNING: dict[str, Callable[[Block], object]] = {
    "average": lambda b: replace_first(b.exp_avg),
    "squares": lambda b: replace_first(b.exp_avg_sq),
    "counter": lambda b: setattr(b, "aux_step", b.aux_step.clone()),
}


@pytest.mark.parametrize("with_extension", [True, False])
@pytest.mark.parametrize("change", [*CHANGES, *WHEN_LEARNING])
def test_other_objects_are_seen(change: str, with_extension: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_extension:
        monkeypatch.setattr(places, "_extension", lambda: None)
    elif not native.available().supported:
        pytest.skip("needs the extension")
    blocks = [make_block(Kron(3, 4), [randn(3, 4).float()]) for _ in range(3)]
    known = {learning: places.objects(blocks, learning) for learning in (False, True)}
    for learning, found in known.items():
        assert list(map(id, found)) == list(map(id, places.objects_by_python(blocks, learning)))
        assert places.has_objects(blocks, learning, found)
        assert not places.has_objects(blocks[:2], learning, found) and not places.has_objects(blocks, learning, [])
        assert not places.has_objects([*blocks, blocks[0]], learning, found)
    {**CHANGES, **WHEN_LEARNING}[change](blocks[1])
    assert not places.has_objects(blocks, True, known[True])
    assert places.has_objects(blocks, False, known[False]) == (change in WHEN_LEARNING)
