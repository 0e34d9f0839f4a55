"""Packed products (fishleg_fast/backends/cpu/packed_matrix.py) against float64, with memory that was spoilt before."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fishleg_fast import native
from fishleg_fast.backends.cpu.packed_matrix import LEFT, RIGHT, PackedMatrix, ProductBatch, engines, padded
from support.dense import randn, relative

OPERANDS = {"amx": torch.bfloat16, "amx split": torch.float32, "avx512": torch.float32}
COARSE = {"amx split": 2.0**-16}  # what it does not keep of float32 operands
SIZES = (1, 5, 31, 32, 33, 65, 100, 130, 1001)
NAN = float("nan")


@pytest.fixture(params=OPERANDS)
def engine(request: pytest.FixtureRequest) -> str:
    if request.param not in engines():
        pytest.skip(f"this processor, or this build, has no {request.param}")
    return request.param


@pytest.fixture
def threads() -> Callable[[int], None]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def spoilt(engine: str, side: int, rows: int, columns: int) -> PackedMatrix:
    """A packed matrix whose memory is NaN, whatever its elements are."""
    matrix = PackedMatrix(engine, side, rows, columns)
    matrix.memory.fill_(0xFF)
    return matrix


def packed(engine: str, side: int, x: Tensor) -> PackedMatrix:
    batch = ProductBatch(engine)
    matrix = batch.pack(x, spoilt(engine, side, *x.shape))
    batch.run()
    return matrix


def multiply(
    engine: str, x: PackedMatrix, y: PackedMatrix, out: PackedMatrix | Tensor, symmetric: bool = False
) -> None:
    batch = ProductBatch(engine)
    batch.multiply(x, y, out, symmetric)
    batch.run()


def product(engine: str, x: Tensor, y: Tensor, symmetric: bool = False) -> Tensor:
    """x y as a matrix, packed and multiplied in spoilt memory."""
    out = torch.full((x.shape[0], y.shape[1]), NAN)
    multiply(engine, packed(engine, LEFT, x), packed(engine, RIGHT, y), out, symmetric)
    return out


def right(engine: str, got: Tensor, x: Tensor, y: Tensor) -> bool:
    """Whether this is x y, of the operands as the engine rounds them, as float32 sums can be: relative to the norm of
    the product, or to what that would be of random matrices where terms happen to cancel.
    """
    x, y = (t.to(OPERANDS[engine]).double() for t in (x, y))
    want, norm = x @ y, torch.linalg.vector_norm
    scale = torch.maximum(norm(want), norm(x) * norm(y) / max(x.shape[1], 1) ** 0.5)
    return bool(norm(got - want) <= COARSE.get(engine, 1e-6) * scale)


def matrix(rows: int, columns: int, transposed: bool = False) -> Tensor:
    return torch.randn(columns, rows).T if transposed else torch.randn(rows, columns)


@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("m", SIZES)
def test_matrices(engine: str, m: int, k: int) -> None:
    torch.manual_seed(m * k)
    for n in SIZES if m * k < 1_100 else (1, 33):
        x, y = torch.randn(m, k), torch.randn(k, n)
        got = product(engine, x, y)
        assert right(engine, got, x, y), n
        columns, rows = x.T.contiguous().T, y.T.contiguous().T  # the same numbers in another layout
        for left, other in ((columns, y), (x, rows), (columns, rows)):
            assert torch.equal(product(engine, left, other), got), n


@given(
    m=st.integers(0, 80), k=st.integers(0, 200), n=st.integers(0, 80), seed=st.integers(0, 99), layout=st.integers(0, 3)
)
@settings(deadline=None, max_examples=50)
def test_any_shape(m: int, k: int, n: int, seed: int, layout: int) -> None:
    torch.manual_seed(seed)
    x, y = matrix(m, k, layout % 2 > 0), matrix(k, n, layout > 1)
    for engine in engines():
        assert right(engine, product(engine, x, y), x, y), engine


@pytest.mark.parametrize("side", [LEFT, RIGHT])
@pytest.mark.parametrize("size", SIZES)
def test_a_packed_result_is_an_operand(engine: str, size: int, side: int) -> None:
    """As packed as if it had been a matrix, to the last bit: its padding is zero too."""
    torch.manual_seed(size)
    for m, n in ((size, 33), (33, size), (size, size)):
        x, y = torch.randn(m, 65), torch.randn(65, n)
        out = spoilt(engine, side, m, n)
        multiply(engine, packed(engine, LEFT, x), packed(engine, RIGHT, y), out)
        assert torch.equal(out.memory, packed(engine, side, product(engine, x, y)).memory)


@pytest.mark.parametrize("size", SIZES)
def test_symmetric_products(engine: str, size: int) -> None:
    """Half of the blocks are computed; the rest is what they are."""
    if engine == "amx split":
        pytest.skip("x y and (yᵀ xᵀ)ᵀ are summed in another order")
    torch.manual_seed(size)
    x = torch.randn(size, 70)
    want = product(engine, x, x.T)
    assert torch.equal(want, want.T) and right(engine, want, x, x.T)
    assert torch.equal(product(engine, x, x.T, symmetric=True), want)
    for side in (LEFT, RIGHT):
        out = spoilt(engine, side, size, size)
        multiply(engine, packed(engine, LEFT, x), packed(engine, RIGHT, x.T), out, symmetric=True)
        assert torch.equal(out.memory, packed(engine, side, want).memory)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 100])
def test_rows_with_gaps_between(engine: str, n: int) -> None:
    torch.manual_seed(n)
    x, y, out = torch.randn(70, 40), torch.randn(40, n), torch.full((72, n + 7), NAN)
    multiply(engine, packed(engine, LEFT, x), packed(engine, RIGHT, y), out[1:71, 3 : n + 3])
    assert right(engine, out[1:71, 3 : n + 3], x, y)
    assert int(out.isnan().sum()) == out.numel() - 70 * n


@pytest.mark.parametrize("m, k, n", [(3, 0, 40), (0, 5, 4), (4, 5, 0), (0, 0, 0)])
def test_empty(engine: str, m: int, k: int, n: int) -> None:
    assert torch.equal(product(engine, torch.ones(m, k), torch.ones(k, n)), torch.zeros(m, n))
    for side in (LEFT, RIGHT):
        out = spoilt(engine, side, m, n)
        multiply(engine, packed(engine, LEFT, torch.ones(m, k)), packed(engine, RIGHT, torch.ones(k, n)), out)
        assert not out.memory.any()


def test_nothing_to_do(engine: str) -> None:
    ProductBatch(engine).run()


def test_inputs_with_gaps(engine: str) -> None:
    torch.manual_seed(0)
    x, y = torch.full((40, 99, 2), NAN), torch.full((99, 35, 3), NAN)
    x[..., 0], y[..., 1] = torch.randn(40, 99), torch.randn(99, 35)
    x, y = x[..., 0], y[..., 1]
    assert 1 not in x.stride() and right(engine, product(engine, x, y), x, y)
    wide = torch.randn(40, 200)[:, 50:149]  # one stride is 1, the other one larger than the matrix
    assert right(engine, product(engine, wide, wide.T), wide, wide.T)


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_what_is_not_finite_reaches_its_own_results(engine: str, value: float) -> None:
    torch.manual_seed(0)
    m, k, n = 45, 70, 50
    x, y = torch.randn(m, k), torch.randn(k, n)
    x[40, 66] = y[2, 33] = value
    lost = torch.zeros(m, n, dtype=torch.bool)
    lost[40] = lost[:, 33] = True
    got = product(engine, x, y)
    assert torch.equal(~got.isfinite(), lost)
    assert torch.equal(got[~lost], product(engine, x.nan_to_num(0, 0, 0), y.nan_to_num(0, 0, 0))[~lost])
    half = spoilt(engine, LEFT, m, n)  # and no others of a product with the packed result
    multiply(engine, packed(engine, LEFT, x), packed(engine, RIGHT, torch.randn(k, n)), half)
    out = torch.empty(m, 40)
    multiply(engine, half, packed(engine, RIGHT, torch.randn(n, 40)), out)
    assert torch.equal((~out.isfinite()).any(1), torch.arange(m) == 40)


def test_the_same_bits_for_any_number_of_threads(engine: str, threads: Callable[[int], None]) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(300, 257), torch.randn(257, 190)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append((product(engine, x, y), product(engine, x, x.T, symmetric=True)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_several_at_once(engine: str) -> None:
    torch.manual_seed(0)
    batch, cases = ProductBatch(engine), []
    for m, k, n in ((40, 30, 20), (1, 200, 64), (129, 3, 33)):
        x, y, out = torch.randn(m, k), torch.randn(k, n), torch.full((m, n), NAN)
        batch.multiply(batch.pack(x, spoilt(engine, LEFT, m, k)), batch.pack(y, spoilt(engine, RIGHT, k, n)), out)
        cases.append((x, y, out))
    batch.run()
    assert all(right(engine, out, x, y) for x, y, out in cases)


def test_torchs_own_products_stay_right(engine: str) -> None:
    """The matrix unit's configuration, which is a thread's, is as torch left it; before, between and after."""
    torch.manual_seed(0)
    x, y = torch.randn(96, 160), torch.randn(160, 64)
    narrow = x.bfloat16(), y.bfloat16()
    want, wrong = narrow[0] @ narrow[1], []

    def work() -> None:
        for _ in range(20):
            if not torch.equal(narrow[0] @ narrow[1], want) or not right(engine, product(engine, x, y), x, y):
                wrong.append(threading.get_ident())

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    work()
    for worker in workers:
        worker.join()
    assert not wrong and torch.allclose(want.double(), narrow[0].double() @ narrow[1].double(), rtol=0.01, atol=0.1)


def test_wrong_arguments(engine: str) -> None:
    ours = native.extension()
    with pytest.raises(ValueError, match=r"engine should be one that this processor has \(.*\) but is: abacus"):
        ours.pack("abacus", [], 1)
    with pytest.raises(ValueError, match=r"engine .* but is: abacus"):
        ours.multiply("abacus", [], 1)
    with pytest.raises(ValueError, match=r"engine .* but is: abacus"):
        ours.packed_size("abacus", 1, 1)
    with pytest.raises(ValueError, match="lanes and depth should be at least 0 but is: -1"):
        ours.packed_size(engine, 5, -1)
    for row, message in [
        ((2, 0, 1, 1, 1, 1, 0, 1, 0), "side should be 0 or 1 but is: 2"),
        ((0, 0, -3, 1, 1, 1, 0, 1, 0), "lanes and depth should be at least 0 but is: -3"),
        ((0, 0, 1, 1, 7, 5, 0, 1, 0), "one stride should be 1 but is: 5"),
        ((0, 0, 1, 40, 40, 1, 0, 64, -32), "after should be a multiple .* but is: -32"),
        ((0, 0, 1, 40, 40, 1, 0, 64, 32), "after should be a multiple .* but is: 32"),
    ]:
        with pytest.raises(ValueError, match=message):
            ours.pack(engine, [row], 1)
    for row, message in [
        ((0, 0, 1, 1, 1, 3, 0, 1, False), "target should be 0, 1 or 2 but is: 3"),
        ((0, 0, 1, 1, -2, 0, 0, 1, False), "rows, columns and depth should be at least 0 but is: -2"),
        ((0, 0, 2, 3, 1, 0, 0, 3, True), "columns should be as many as rows where symmetric but is: 3"),
        ((0, 0, 2, 3, 1, 0, 0, 2, False), "stride should be at least columns but is: 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            ours.multiply(engine, [row], 1)


@pytest.mark.parametrize("engine", engines())
@pytest.mark.parametrize("depth", [1, 32, 45])
def test_an_operand_in_two_parts(depth: int, engine: str) -> None:
    """X₁Y₁ + X₂Y₂ as one product, whatever was between the parts."""
    half = padded(engine, depth)
    xs, ys = [randn(40, depth, seed=k).float() for k in (1, 2)], [randn(depth, 37, seed=k).float() for k in (3, 4)]
    left, right = spoilt(engine, LEFT, 40, half + depth), spoilt(engine, RIGHT, half + depth, 37)
    batch, out = ProductBatch(engine), torch.full((40, 37), torch.nan)
    for after, x, y in zip((0, half), xs, ys, strict=True):
        batch.pack(x, left, after)
        batch.pack(y, right, after)
    batch.multiply(left, right, out)
    batch.run()
    want = sum(x.double() @ y.double() for x, y in zip(xs, ys, strict=True))
    assert relative(out.double(), want) <= (1e-2 if engine == "amx" else 1e-4)


def test_engines_are_those_of_the_processor() -> None:
    assert set(engines()) <= set(OPERANDS)
    assert ("avx512" in engines()) == (torch.backends.cpu.get_cpu_capability() == "AVX512") or not engines()
