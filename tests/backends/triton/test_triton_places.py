"""Where tensors are: the extension's answer changes whenever torch's does, and no more often."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch
from torch import Tensor

from fishleg_fast import native
from fishleg_fast.kernels.host.tables import places

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
