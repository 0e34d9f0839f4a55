"""Training with low-rank gradients is training with dense ones; resuming, and precision, are as with them."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import nn

from fishleg_fast import BernoulliLikelihood, Kron, precision
from support.dense import relative
from support.training import autoencoder, make, state, train

EXACT = 1e-10


def twice() -> nn.Sequential:
    inner = nn.Linear(40, 40)
    return nn.Sequential(inner, nn.Tanh(), inner, nn.Tanh(), nn.Linear(40, 40))


RUNS: dict[str, tuple[dict, dict]] = {
    "kron": ({}, {}),
    "sumkron": ({"structure": "sumkron"}, {}),
    "factors in blocks": ({"max_factor_size": 25}, {}),
    "bernoulli": ({"likelihood": BernoulliLikelihood}, {}),
    "momentum after": ({"momentum": "after", "nesterov": False}, {}),
    "trust": ({"normalize": "trust", "kappa": 1e-2}, {}),
    "no momentum": ({"beta": 0.0, "normalize": None, "lr": 1e-3}, {}),
    "u momentum": ({"u_sampling": "momentum"}, {}),
    "u gaussian": ({"u_sampling": "gaussian", "precondition_aux": True}, {}),
    "preconditioned, shape only": ({"precondition_aux": True, "learn_scale": False}, {}),
    "two updates a step": ({"update_aux_every": -2, "anchor_every": 0}, {}),
    "hessian": ({"fisher": "hessian", "update_aux_every": 1}, {}),
    "positions": ({}, {"time": (2,), "sizes": (3,)}),
    "weights shared over time": ({"build": twice}, {}),
    "no bias": ({"build": partial(autoencoder, bias=False)}, {}),
    "frozen biases": ({"params": lambda n: [p for p in n.parameters() if p.requires_grad_(p.ndim > 1).ndim > 1]}, {}),
    "groups": ({"params": lambda net: [{"params": [p], "lr": 1e-3 * len(p)} for p in net.parameters()]}, {}),
    "batches of many sizes": ({}, {"sizes": (6, 1, 50, 3)}),
    "dense: maximize": ({"maximize": True}, {}),
    "dense: no gradient of the biases": ({}, {"bias": False}),
    "dense: diagkron": ({"structure": "diagkron"}, {}),
    "dense: kron with scale": ({"structure": partial(Kron, scale=True)}, {}),
    "dense: diagonal": ({"structure": "diagonal", "aux_lr": 1e-3}, {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_training_is_that_of_dense_gradients(name: str) -> None:
    options, data = RUNS[name]
    states = []
    for low_rank in (True, False):
        net, optimizer = make(low_rank, **options)
        start = state(optimizer)
        was, all_sizes = train(net, optimizer, range(25), **data), itertools.cycle(data.get("sizes", (6,)))
        assert was == [low_rank and size < 50 and "dense" not in name for _, size in zip(was, all_sizes, strict=False)]
        assert optimizer.diagnostics()["steps"] == 25 and optimizer.diagnostics()["skipped_aux_steps"] == 0
        states.append(state(optimizer))
    assert relative(*states) <= EXACT and relative(start, states[0]) > 0.01


@pytest.mark.parametrize("sizes", [(6,), (6, 50, 1)], ids=["even", "uneven"])
@pytest.mark.parametrize("at", [5, 8, 9])
def test_resuming_is_bit_for_bit(at: int, sizes: tuple) -> None:
    """... and but for rounding with a checkpoint of the other kind of gradients, in the midst of λ's cycle or not."""
    saved, ends = {}, {}
    for low_rank in (True, False):
        net, optimizer = make(low_rank, update_aux_every=4, anchor_every=8)
        train(net, optimizer, range(at), sizes=sizes)
        torch.save((net.state_dict(), optimizer.state_dict()), buffer := io.BytesIO())
        train(net, optimizer, range(at, at + 6), sizes=sizes)
        saved[low_rank], ends[low_rank] = buffer.getvalue(), state(optimizer)
    for (origin, checkpoint), low_rank in itertools.product(saved.items(), (True, False)):
        net, optimizer = make(low_rank, update_aux_every=4, anchor_every=8)
        train(net, optimizer, range(2))  # a state to be overwritten
        weights, kept = torch.load(io.BytesIO(checkpoint), weights_only=True)
        net.load_state_dict(weights)
        optimizer.load_state_dict(kept)
        train(net, optimizer, range(at, at + 6), sizes=sizes)
        assert relative(state(optimizer), ends[origin]) <= EXACT
        assert low_rank != origin or torch.equal(state(optimizer), ends[origin])


def settings_of_torch() -> tuple[str, str, str]:
    matmul = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    return matmul[0].fp32_precision, matmul[1].fp32_precision, torch.get_float32_matmul_precision()


@pytest.fixture
def users_setting() -> Iterator[Callable[[str], None]]:
    """Sets torch's own precision, and puts it back."""
    before = settings_of_torch()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before[2])
    torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before[:2]


bfloat16 = pytest.mark.skipif(not precision._fast_bfloat16(), reason="the CPU has no bfloat16 products")


@bfloat16
@pytest.mark.parametrize("setting", ["highest", "medium", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_is_the_optimizers_own(dtype: torch.dtype, setting: str | None, users_setting: Callable) -> None:
    """Under the user's "medium", set while the optimizer steps; float64 knows only one. torch's settings stay."""
    states, found = [], []
    note = lambda *_: found.append(settings_of_torch())
    for own, users in (("highest", "highest"), (setting, "medium")):
        net, optimizer = make(dtype=dtype, precision=own)
        for change in (lambda *_, users=users: users_setting(users), note):
            optimizer.register_step_pre_hook(change)
        for change in (note, lambda *_: users_setting("highest")):
            optimizer.register_step_post_hook(change)
        train(net, optimizer, range(7))
        states.append(state(optimizer))
        rounded = (own or users) == "medium" and dtype == torch.float32
        assert (optimizer.blocks[0].structure.operand_dtype == torch.bfloat16) == rounded
        optimizer.blocks[0].structure.fishleg_aux["R"].fill_(float("nan"))
        with pytest.raises(RuntimeError, match="is not finite"):
            optimizer.step()
        note()
    assert len(found) == 32 and found[::2] == found[1::2]
    assert 1e-5 < relative(*states) < 0.2 if rounded else torch.equal(*states)
