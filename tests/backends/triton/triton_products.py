"""Q u and inner products by the Triton kernels, interpreted: test_triton.py runs this file with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from fishleg_fast import DiagKron, Diagonal, Kron
from fishleg_fast.algebra.low_rank import LowRank
from fishleg_fast.backends import reference as steps
from fishleg_fast.backends.protocol import LambdaOptions, ThetaOptions
from fishleg_fast.kernels import backend
from fishleg_fast.kernels.host.qv import kron_qv
from fishleg_fast.model.gradients import GradientInPlace
from support.blocks import make_block, theta
from support.dense import randn, relative
from support.triton_blocks import (
    CLOSE,
    all_blocks,
    assert_learned,
    aux_inputs,
    backend_kind,
    dense_qv,
    matrices,
    pair,
    poison,
    products,
    sized_blocks,
    tamed,
)

pytestmark = pytest.mark.usefixtures("interpreter_of_numpy_2_4", "poisoned")


def test_qv_and_refresh(launches: list[str]) -> None:
    """Tensors: 2 launches, 2 more for DiagKron, 1 for Diagonal; 1 for all P and S, 1 for all copies of DiagKron."""
    _, blocks = pair(all_blocks)
    blocks = [b for b in blocks if backend_kind(b)]
    us = matrices(blocks, 1)
    vs = backend.qv(blocks, us)
    products_in_order = ["right_kernel", "left_kernel"] * 2
    assert launches == ["copy_kernel", "refresh_kernel", *products_in_order, "diagonal_product_kernel"]
    for b, u, v in zip(blocks, us, vs, strict=True):
        assert relative(v, dense_qv(b, u)) <= CLOSE, b.shape
    kron = [b for b in blocks if backend_kind(b) == "kron"]
    for b in kron:
        for k, (P, S, _) in enumerate(products(b), 1):
            name = str(k) if "P1" in b.structure.cache else ""
            assert relative(b.structure.cache["P" + name], P) <= CLOSE
            assert relative(b.structure.cache["S" + name], S) <= CLOSE
    launches.clear()
    backend.qv(kron, [u for b, u in zip(blocks, us, strict=True) if b in kron])
    assert "refresh_kernel" not in launches  # λ is what it was
    kron[0].structure.fishleg_aux["R"].mul_(2)
    backend.refresh(kron)
    assert launches.count("refresh_kernel") == 1
    assert relative(kron[0].structure.cache["P"], products(kron[0])[0][0]) <= CLOSE


def test_sizes() -> None:
    """Every op on blocks of 1, 63 and 257."""
    exact, ours = pair(sized_blocks)
    us, vs, fvs = aux_inputs(exact, 1)
    for b, u, v in zip(ours, us, backend.qv(ours, us), strict=True):
        assert relative(v, dense_qv(b, u)) <= CLOSE, b.shape
    options = {"damping": 0.1, "lr": 0.01, "eps": 1e-4}
    steps.lambda_step(exact, *[[x.double() for x in xs] for xs in (us, vs, fvs)], LambdaOptions(**options))
    before = [{k: t.clone() for k, t in b.structure.fishleg_aux.items()} for b in ours]
    backend.lambda_step(ours, us, vs, fvs, LambdaOptions(**options))
    assert_learned(exact, ours, before)
    old = [theta(b) for b in exact]
    norms, _ = steps.theta_step(exact, [u.double() for u in us], ThetaOptions())
    got, _ = backend.theta_step(ours, us, ThetaOptions())
    assert relative(got, norms) <= CLOSE
    for a, b, before in zip(exact, ours, old, strict=True):
        assert relative(theta(b) - before, theta(a) - before) <= CLOSE * 5, b.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_read_where_they_are(dtype: torch.dtype) -> None:
    """Transposed, channels-last, sliced and missing ones, times a scalar; those with three strides are copied."""
    o = {"dtype": torch.float32}
    cases = [
        (Kron(6, 13, **o), [randn(12, 6, dtype=dtype).T, randn(6, 3, dtype=dtype)[:, 1]]),
        (
            Kron(8, 28, **o),
            [randn(8, 3, 3, 3, dtype=dtype).to(memory_format=torch.channels_last), randn(8, dtype=dtype)],
        ),
        (Kron(5, 8, **o), [randn(9, 2, 4, 2, dtype=dtype)[1:6, :, :, 1].transpose(1, 2)]),
        (Kron(4, 24, **o), [randn(4, 2, 3, 4, dtype=dtype).permute(0, 2, 1, 3)]),
        (DiagKron(6, 13, **o), [randn(12, 6, dtype=dtype).T, randn(6, 3, dtype=dtype)[:, 1]]),
        (Diagonal((24, 1), **o), [randn(4, 3, 2, dtype=dtype).permute(1, 0, 2)]),
        (Diagonal((6, 5), **o), [randn(4, 6, dtype=dtype).T, randn(6, dtype=dtype)]),
    ]
    blocks = [make_block(s, ps, 0 if s.shape == (24, 1) else 1, i) for i, (s, ps) in enumerate(cases)]
    blocks[0].grads = [None, blocks[0].grads[1]]
    blocks[1].grads = [blocks[1].grads[0], None]
    poison(blocks)
    c = torch.tensor(0.25)
    vs = backend.qv(blocks, [GradientInPlace(b, c) for b in blocks])
    for b, v in zip(blocks, vs, strict=True):
        assert relative(v, dense_qv(b, 0.25 * b.matrix(b.grads))) <= CLOSE, b.shape


def test_low_rank_and_uncovered_blocks_go_to_the_reference() -> None:
    blocks = [tamed(make_block(Kron(6, 5, dtype=torch.float32), [randn(6, 5).float()])), all_blocks(torch.float32)[-1]]
    low_rank = LowRank(randn(2, 6).float(), randn(2, 5).float())
    assert backend_kind(blocks[1]) is None
    v, w = backend.qv(blocks, [low_rank, randn(6, 5).float()])
    assert isinstance(v, LowRank) and relative(v.dense, dense_qv(blocks[0], low_rank.dense)) <= CLOSE
    assert relative(w, steps.qv(blocks[1:], [randn(6, 5).float()])[0]) <= 1e-6


@pytest.mark.parametrize("name", "RLAB")
def test_lambda_has_to_be_row_major(name: str) -> None:
    block = make_block(DiagKron(3, 3, dtype=torch.float32), [randn(3, 3).float()])
    block.structure.fishleg_aux[name] = randn(3, 3).float().T
    with pytest.raises(ValueError, match="row-major"):
        backend.qv([block], [randn(3, 3).float()])


def test_inner() -> None:
    xs = [randn(63, 5).float(), randn(4, 3, 2).permute(2, 0, 1).bfloat16(), randn(0, 3).float(), randn(5000).float()]
    want = sum((x.double() ** 2).sum() for x in xs)
    assert relative(backend.inner(xs, xs), want) <= CLOSE
    ys = [randn(5, 63, seed=1).float().T, *xs[1:]]
    want += (xs[0].double() * ys[0].double()).sum() - (xs[0].double() ** 2).sum()
    assert relative(backend.inner(xs, ys), want) <= CLOSE
    blocks = all_blocks(torch.float32)
    splits = [GradientInPlace(b) for b in blocks]
    assert (
        relative(backend.inner(splits, splits), sum((b.matrix(b.grads).double() ** 2).sum() for b in blocks)) <= CLOSE
    )
    scaled = [GradientInPlace(b, torch.tensor(0.5)) for b in blocks]
    assert relative(backend.inner(scaled, splits), 0.5 * steps.inner(splits, splits)) <= CLOSE
    low_rank = LowRank(randn(2, 6).float(), randn(2, 5).float())
    assert (
        relative(backend.inner([low_rank, xs[0]], [low_rank, xs[0]]), steps.inner([low_rank, xs[0]], [low_rank, xs[0]]))
        <= CLOSE
    )


def test_opcheck() -> None:
    us = [randn(5, 33).float(), randn(1, 1).bfloat16()]
    Ps, Ss = [randn(k, k).float() for k in (5, 1)], [randn(k, k).float() for k in (33, 1)]
    Ps, Ss = [[x + x.T for x in xs] for xs in (Ps, Ss)]
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(kron_qv, (us, Ps, Ss, "ieee"))
    for v, u, P, S in zip(kron_qv(us, Ps, Ss, "ieee"), us, Ps, Ss, strict=True):
        assert relative(v, P.double() @ u.double() @ S.double()) <= CLOSE
    with pytest.raises(ValueError, match="P and S should be"):
        kron_qv(us, Ss, Ps, "ieee")
