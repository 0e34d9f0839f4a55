"""Anchoring by the cpp backend, against the reference's and against inverses in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fishleg_fast import native
from fishleg_fast.algebra.structures.base import LayerStatistics
from fishleg_fast.algebra.structures.kron import Kron
from fishleg_fast.backends import reference as steps
from fishleg_fast.backends import registry
from fishleg_fast.backends.cpu import anchoring
from fishleg_fast.backends.cpu.packed_matrix import engines
from fishleg_fast.backends.reference import anchoring as reference_anchoring
from fishleg_fast.model.block import Block, Part
from support.dense import randn, relative

OPS = registry.choose("cpp", torch.device("cpu"), torch.float32)[1]
SIZES = [(1, 1), (7, 33), (32, 31), (100, 64), (257, 129), (500, 785)]
# Operands' dtype -> what it takes, and how far moments and Q may be from those of float64.
CLOSE = {torch.float32: ("avx512", 1e-5, 3e-5), torch.bfloat16: ("amx", 4e-3, 1e-4)}


@pytest.fixture(params=CLOSE, ids=["highest", "medium"])
def operands(request: pytest.FixtureRequest) -> torch.dtype:
    if CLOSE[request.param][0] not in engines():
        pytest.skip("this processor has no such engine")
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def block_of(m: int, n: int, operands: torch.dtype, **options: object) -> Block:
    block = Block("layer", [Part(nn.Parameter(torch.zeros(m, n)))], 1, Kron(m, n, **options))
    block.structure.operand_dtype = operands
    block.allocate(on_device=False)
    for t in block.structure.fishleg_aux.values():
        t.copy_(randn(*t.shape, seed=5))  # also above the diagonal, where learning writes
    return block


def shown(m: int, n: int, positions: int = 40, seed: int = 0) -> LayerStatistics:
    a, e = (randn(positions, k, seed=seed + k, dtype=torch.float32) for k in (n, m))
    return LayerStatistics(a * torch.linspace(0.1, 2, n), e / positions, float(positions))


def spectrum(k: int, smallest: float, seed: int = 0) -> Tensor:
    """A symmetric matrix with eigenvalues from 1 down to that, in float64."""
    Q = torch.linalg.qr(randn(k, k, seed=seed)).Q
    return Q * torch.logspace(0, torch.tensor(smallest).log10().item(), k, dtype=torch.float64) @ Q.T


def damped(block: Block, damping: float, weight: float) -> tuple[Tensor, Tensor]:
    """G + √γ/π I and Ā + π√γ I, in float64."""
    G, A = (block.moments[name].double() / weight for name in ("rows", "columns"))
    pi = (A.diagonal().mean() / G.diagonal().mean()).sqrt()
    return (
        G + damping**0.5 / pi * torch.eye(len(G), dtype=torch.float64),
        A + damping**0.5 * pi * torch.eye(len(A), dtype=torch.float64),
    )


def factors(block: Block) -> tuple[Tensor, Tensor]:
    R, L = (block.structure.fishleg_aux[name].double() for name in ("R", "L"))
    return R.T @ R, L @ L.T


def state(block: Block) -> list[Tensor]:
    return [t.clone() for t in (*block.structure.fishleg_aux.values(), *block.moments.values(), block.moments_weight)]


def anchor(
    blocks: list[Block], news: Sequence[LayerStatistics | dict], decay: float, damping: float, ops: Any = OPS
) -> None:
    ops.start_kfac(ops.average_moments(blocks, news, decay), damping)


def refuse(*args: object) -> None:
    raise AssertionError("the reference's function was called")


def test_against_the_reference_and_float64(operands: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    _, coarse, fine = CLOSE[operands]
    ours, theirs = ([block_of(m, n, torch.float32) for m, n in SIZES] for _ in range(2))
    for b in ours:
        b.structure.operand_dtype = operands
    for step in range(3):
        news = [shown(m, n, seed=step) for m, n in SIZES]
        anchor(theirs, news, decay=0.8, damping=0.01, ops=steps)
        with monkeypatch.context() as patch:
            patch.setattr(Kron, "start_kfac", refuse)
            patch.setattr(Kron, "average", refuse)
            anchor(ours, news, decay=0.8, damping=0.01)
    for b, t in zip(ours, theirs, strict=True):
        assert b.moments_weight == t.moments_weight
        for name, moment in b.moments.items():
            assert torch.equal(moment, moment.T)
            assert relative(moment, t.moments[name]) < coarse
        R, L = b.structure.fishleg_aux.values()
        assert torch.equal(R, R.tril()) and torch.equal(L, L.triu())
        size = [torch.linalg.vector_norm(F.diagonal()) / len(F) ** 0.5 for F in (R, L)]
        assert relative(*size) < 1e-5
        wanted = damped(b, 0.01, b.moments_weight.item())
        truth = torch.linalg.inv(wanted[0]), torch.linalg.inv(wanted[1])
        P, S = factors(b)
        c = P.norm() / truth[0].norm()
        assert relative(P / c, truth[0]) < fine and relative(S * c, truth[1]) < fine


@pytest.mark.parametrize("smallest", [1e-2, 1e-4, 1e-6, 1e-8])
def test_stiff_directions(operands: torch.dtype, smallest: float) -> None:
    """Where the moments are large Q is small: P is right there too, relative to itself, however large elsewhere."""
    m, n = 300, 130
    block = block_of(m, n, operands)
    for name, k in (("rows", m), ("columns", n)):
        block.moments[name].copy_(spectrum(k, smallest))
    block.moments_weight.fill_(0.5)
    damping = (smallest * 4) ** 2
    (_, inverting) = anchoring._engines(block, shown(m, n))
    if anchoring._start(inverting, [block], damping):
        assert smallest == 1e-8  # which the reference does in float64
        return
    roundoff = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-15}[operands]
    for sigma, P in zip(damped(block, damping, 0.5), factors(block), strict=True):
        values, vectors = torch.linalg.eigh(sigma)
        whitened = (vectors.T @ P @ vectors) * values.sqrt() * values.sqrt()[:, None]  # a multiple of the identity
        stiff = whitened.diagonal()[values > 0.1]
        c = stiff.mean()
        assert relative(stiff / c, torch.ones(len(stiff))) < 8 * roundoff
        if smallest > 1e-8:
            assert relative(whitened.diagonal() / c, torch.ones(len(sigma))) < roundoff / smallest


def test_any_number_of_threads(operands: torch.dtype, threads: None) -> None:
    results = []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        blocks = [block_of(m, n, operands) for m, n in SIZES]
        anchor(blocks, [shown(m, n) for m, n in SIZES], decay=0.9, damping=0.1)
        results.append([t for b in blocks for t in state(b)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_many_positions(operands: torch.dtype) -> None:
    """More than are packed at a time; and none."""
    block, other = block_of(5, 40, operands), block_of(5, 40, torch.float32)
    for new in (shown(5, 40, 5000), shown(5, 40, 0), shown(5, 40, 1)):
        anchor([block], [new], decay=0.5, damping=0.1)
        anchor([other], [new], decay=0.5, damping=0.1, ops=steps)
        for name, moment in block.moments.items():
            assert relative(moment, other.moments[name]) < CLOSE[operands][1]


def test_layouts(operands: torch.dtype) -> None:
    m, n = 20, 50
    new = shown(m, n)
    wide = torch.zeros(40, 90)
    wide[:, 10:60] = new.a
    results = []
    for a, e in [(new.a, new.e), (wide[:, 10:60], new.e.T.contiguous().T), (new.a.T.contiguous().T, new.e)]:
        block = block_of(m, n, operands)
        anchor([block], [LayerStatistics(a, e, new.terms)], decay=0.5, damping=0.1)
        results.append(state(block))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_is_left_out(operands: torch.dtype, bad: float) -> None:
    blocks, news = [block_of(40, 30, operands) for _ in range(3)], [shown(40, 30) for _ in range(3)]
    news[0].a[7, 3], news[2].e[39, 39] = bad, bad
    before = [state(b) for b in blocks]
    versions = [b.structure.version for b in blocks]
    anchor(blocks, news, decay=0.5, damping=0.1)
    for k in (0, 2):
        assert all(map(torch.equal, state(blocks[k]), before[k])) and blocks[k].structure.version == versions[k]
    assert blocks[1].moments_weight == 0.5 and blocks[1].structure.version != versions[1]


def test_where_float32_fails_float64_follows(operands: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [block_of(40, 30, operands) for _ in range(2)]
    blocks[0].moments["rows"].copy_(spectrum(40, 1e-3) - 2e-3 * torch.eye(40))
    blocks[0].moments["columns"].copy_(spectrum(30, 1e-3))
    blocks[0].moments_weight.fill_(1)
    (_, inverting) = anchoring._engines(blocks[0], shown(40, 30))
    before = state(blocks[0])
    assert anchoring._start(inverting, blocks[:1], 1e-30) == blocks[:1]
    assert all(map(torch.equal, state(blocks[0]), before))
    called = []
    monkeypatch.setattr(anchoring, "_start", lambda engine, found, damping: found[:1])
    monkeypatch.setattr(reference_anchoring, "start_kfac", lambda found, damping: called.append((found, damping)))
    anchor(blocks, [shown(40, 30)] * 2, decay=0.5, damping=0.1)
    assert called == [(blocks[:1], 0.1)]


def test_moments_that_are_not_positive_are_refused(operands: torch.dtype) -> None:
    block = block_of(4, 3, operands)
    block.moments["rows"].copy_(1e3 + torch.eye(4)).diagonal()[2] = 0
    before = [t.clone() for t in block.structure.fishleg_aux.values()]
    with pytest.raises(torch.linalg.LinAlgError, match="positive semi-definite"):
        anchor([block], [shown(4, 3)], decay=0.5, damping=0.1)
    assert all(map(torch.equal, before, block.structure.fishleg_aux.values()))


@pytest.mark.parametrize(("m", "n", "size"), [(20, 30, 16), (20, 31, 16), (33, 7, 5), (5, 9, 1), (300, 130, 100)])
def test_factors_in_blocks(
    operands: torch.dtype, monkeypatch: pytest.MonkeyPatch, m: int, n: int, size: int
) -> None:
    """Of one width, with zeros beyond the last row."""
    _, coarse, fine = CLOSE[operands]
    blocks, others = ([block_of(m, n, operands, max_factor_size=size), block_of(m, n, operands)] for _ in range(2))
    for b in (*blocks, *others):
        for t in b.structure.fishleg_aux.values():
            t.zero_()
    news = [shown(m, n)] * 2
    anchor(others, news, decay=0.8, damping=0.01, ops=steps)
    with monkeypatch.context() as patch:
        patch.setattr(Kron, "start_kfac", refuse)
        patch.setattr(Kron, "average", refuse)
        anchor(blocks, news, decay=0.8, damping=0.01)
    for b, o in zip(blocks, others, strict=True):
        assert b.moments_weight == o.moments_weight
        for name, moment in b.moments.items():
            assert relative(moment, o.moments[name]) < coarse
        weight = b.moments_weight.item()
        R, L = (t.double() for t in b.structure.fishleg_aux.values())
        truths, products = [], [R.mT @ R, L @ L.mT]
        traces = [moment.diagonal(dim1=-2, dim2=-1).sum().item() / weight for moment in b.moments.values()]
        means = [trace / k for trace, k in zip(traces, b.shape, strict=True)]
        pi = (means[1] / means[0]) ** 0.5
        for moment, shift in zip(b.moments.values(), (0.1 / pi, 0.1 * pi), strict=True):
            truths.append(torch.linalg.inv(moment.double() / weight + shift * torch.eye(moment.shape[-1]).double()))
        c = products[0].norm() / truths[0].norm()
        assert relative(products[0] / c, truths[0]) < fine and relative(products[1] * c, truths[1]) < fine
        sizes = [
            torch.linalg.vector_norm(F.diagonal(dim1=-2, dim2=-1).flatten()[:k]) / k**0.5
            for F, k in zip((R, L), b.shape, strict=True)
        ]
        assert relative(*sizes) < 1e-5
    blocks[0].moments["columns"].flatten()[0] = float("nan")
    before = state(blocks[0])
    wrong = shown(m, n)
    wrong.a[3, n - 1] = float("inf")
    assert anchoring.average_moments(blocks[:1], [wrong], 0.8) == []
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(state(blocks[0]), before, strict=True))


def test_others_go_to_the_reference(operands: torch.dtype) -> None:
    m, n = 20, 30
    options: list[dict[str, object]] = [{}, {"scale": True}, {"diagonal": "R"}, {"diagonal": "L"}]
    options.append({"dtype": torch.float64})
    blocks = [block_of(m, n, operands, **o) for o in options]
    others = [block_of(m, n, operands, **o) for o in options]
    wide = LayerStatistics(shown(m, n).a.double(), shown(m, n).e.double(), 40.0)
    news = [shown(m, n)] * 4 + [wide]
    assert [anchoring._engines(b, new) is None for b, new in zip(blocks, news, strict=True)] == [False] + [True] * 4
    assert anchoring._engines(blocks[0], wide) is None
    anchor([*blocks, blocks[0]], [*news, {}], decay=0.5, damping=0.1)
    anchor(others, news, decay=0.5, damping=0.1, ops=steps)
    for b, o in zip(blocks[1:], others[1:], strict=True):
        assert all(map(torch.equal, state(b), state(o)))


def test_moments_that_come_as_such_are_started_from_here(
    operands: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs, twice = (block_of(40, 30, operands) for _ in range(3))
    for step in range(2):
        new = shown(40, 30, seed=step)
        moments = ours.structure.layer_moments(*new)
        anchor([theirs], [{name: t.clone() for name, t in moments.items()}], decay=0.8, damping=0.01, ops=steps)
        with monkeypatch.context() as patch:
            patch.setattr(Kron, "start_kfac", refuse)
            anchor([ours, twice], [moments, {**moments, "rows": moments["rows"] * math.nan}], decay=0.8, damping=0.01)
    assert ours.moments_weight == theirs.moments_weight and twice.moments_weight == 0
    assert all(torch.equal(t, theirs.moments[name]) for name, t in ours.moments.items())
    pairs = zip(factors(ours), factors(theirs), strict=True)
    (P, P2), (S, S2) = pairs
    assert relative(torch.kron(P[:9, :9], S[:9, :9]), torch.kron(P2[:9, :9], S2[:9, :9])) < CLOSE[operands][1]


def test_layers_below_zero(operands: torch.dtype) -> None:
    """Output gradients below a layer that starts at zero vanish; R and L have one size nonetheless."""
    block, new = block_of(40, 30, operands), shown(40, 30)
    anchor([block], [LayerStatistics(new.a, torch.zeros_like(new.e), 40.0)], decay=0.5, damping=0.1)
    R, L = block.structure.fishleg_aux.values()
    assert torch.isfinite(R).all() and torch.isfinite(L).all()
    assert relative(R.diagonal().norm() / 40**0.5, L.diagonal().norm() / 30**0.5) < 1e-3


def test_refusals() -> None:
    extension = native.extension()
    with pytest.raises(ValueError, match="engine should be one that this processor has"):
        extension.start_kfac("abacus", [], 0.1, 1)
    if engines():
        with pytest.raises(ValueError, match="should hold all rows but are: 1 of 2 for 3"):
            extension.start_kfac(engines()[0], [((0, 0, 3, 1, 2), (0, 0, 3, 1, 3), 1.0)], 0.1, 1)
        with pytest.raises(ValueError, match="rows have no gaps but is: 4 by 5, rows 3 apart"):
            extension.average_moments(engines()[0], [[(0, 4, 5, 3, 0, 5, 1.0)] * 2], 0.5, 1)
