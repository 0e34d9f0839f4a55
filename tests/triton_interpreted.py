"""The Triton kernels in Triton's interpreter, on CPU tensors; test_triton.py runs this file with TRITON_INTERPRET=1.

Uninitialised memory, scratch and outputs hold NaN. Truth is the reference in float64, on the same numbers.
"""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import triton.runtime.interpreter as interpreter
from dense import randn, relative
from test_reference_steps import assert_same, everything, make_block, theta
from torch import Tensor, nn

from fishleg_fast import CategoricalLikelihood, DiagKron, Diagonal, FishLeg, Kron, SumKron, backends
from fishleg_fast.blocks import Block, Part
from fishleg_fast.kernels import backend, configurations, launch, table
from fishleg_fast.kernels.diagkron import middle
from fishleg_fast.kernels.qv import kron_qv
from fishleg_fast.reference import steps
from fishleg_fast.reference.thin import Split, Thin

CLOSE = 2e-5  # relative RMS of float32 sums over a few hundred terms
NAN = float("nan")


@pytest.fixture(autouse=True, scope="session")
def _interpreter_of_numpy_2_4() -> None:
    """NumPy 2.4 refuses int(array of one element), which Triton 3.6's interpreter asks for the ends of ranges."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """torch.empty is full of NaN."""
    torch.use_deterministic_algorithms(True)
    with torch.no_grad():
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launches() -> Iterator[list[str]]:
    """The names of kernels, as they are launched."""
    names: list[str] = []
    launch.observers.append(names.append)
    yield names
    launch.observers.remove(names.append)


def poison(blocks: list[Block]) -> None:
    """NaN wherever kernels have to write before they read."""
    for b in blocks:
        if backend_kind(b) not in ("kron", "diagkron"):
            continue
        own, (m, n) = table.workspace(b), b.shape
        k = table.padded
        own.scratch("U", m, k(n)), own.scratch("UT", n, k(m)), own.scratch("WS", own.terms, m, k(n))
        for name, t in b.structure.fishleg_aux.items():
            if name[0] in "RL":
                for x in ("sym", "new", "grad"):
                    own.scratch(f"{x} {name}", len(t), k(len(t)))
        for t in (own.XT, own.out, *(t for name, t in own.more.items() if name != "arrived")):
            t.fill_(NAN)
        if own.version is None:
            own.S.fill_(NAN), own.P.fill_(NAN)
            if backend_kind(b) == "diagkron":
                middle(b).S.fill_(NAN), middle(b).P.fill_(NAN)


def backend_kind(block: Block) -> str | None:
    from fishleg_fast.kernels.rows import kind

    return kind(block)


Maker = Callable[..., list[Block]]


def kron_blocks(dtype: torch.dtype = torch.float64, scaled: bool = True, **group: object) -> list[Block]:
    """Shapes of every kind: one element, odd, with a bias or without, more than one tile each way; scaled; sums."""
    o, f = {"dtype": dtype}, {"dtype": dtype}
    blocks = [
        make_block(Kron(33, 18, **o), [randn(33, 17, **f), randn(33, seed=1, **f)], **group),
        make_block(Kron(1, 1, **o), [randn(1, 1, seed=2, **f)], seed=1, **group),
        make_block(SumKron(5, 20, **o), [randn(5, 19, seed=3, **f), randn(5, seed=4, **f)], seed=2, **group),
        make_block(Kron(16, 48, **o), [randn(16, 48, seed=5, **f)], seed=3, **group),
    ]
    if scaled:
        blocks.append(make_block(Kron(7, 9, scale=True, **o), [randn(7, 9, seed=6, **f)], seed=4, **group))
    return [tamed(b) for b in blocks]


def sized_blocks(dtype: torch.dtype = torch.float64, **group: object) -> list[Block]:
    """1, 63 and 257 on either side; of 257, nine tiles, the last of one row."""
    f = {"dtype": dtype}
    shapes = [(257, 63), (63, 1), (1, 63), (1, 1)]
    return [
        tamed(
            make_block(Kron(m, n, **f), [randn(m, n - 1, **f), randn(m, **f)] if n > 1 else [randn(m, 1, **f)], **group)
        )
        for m, n in shapes
    ] + [
        tamed(make_block(DiagKron(m, n, **f), [randn(m, n, **f)], seed=m, **group))
        for m, n in [(257, 63), (1, 257), (63, 1)]
    ]


def diagkron_blocks(dtype: torch.dtype = torch.float64, **group: object) -> list[Block]:
    """As ``kron_blocks``."""
    o, f = {"dtype": dtype}, {"dtype": dtype}
    blocks = [
        make_block(DiagKron(3, 4, **o), [randn(3, 4, **f)], seed=7, **group),
        make_block(DiagKron(18, 35, **o), [randn(18, 34, **f), randn(18, seed=1, **f)], seed=9, **group),
        make_block(DiagKron(1, 1, **o), [randn(1, 1, seed=2, **f)], seed=10, **group),
        make_block(DiagKron(1, 17, **o), [randn(1, 17, seed=3, **f)], seed=11, **group),
        make_block(DiagKron(17, 1, **o), [randn(17, 1, seed=4, **f)], seed=12, **group),
    ]
    return [tamed(b) for b in blocks]


def factored_blocks(dtype: torch.dtype = torch.float64, **group: object) -> list[Block]:
    return kron_blocks(dtype, **group) + diagkron_blocks(dtype, **group)[:2]


def all_blocks(dtype: torch.dtype = torch.float64, **group: object) -> list[Block]:
    """The same, and Diagonal blocks, and those that the reference's functions do."""
    o, f = {"dtype": dtype}, {"dtype": dtype}
    return kron_blocks(dtype, **group) + [
        tamed(make_block(Diagonal((70, 1), **o), [randn(63, **f), randn(7, **f)], 0, 5, **group)),
        tamed(make_block(Diagonal((3, 5), **o), [randn(3, 4, **f), randn(3, **f)], 1, 6, **group)),
        *diagkron_blocks(dtype, **group)[:2],
        tamed(make_block(Kron(6, 5, max_factor_size=2, **o), [randn(6, 5, **f)], seed=8, **group)),
    ]


def tamed(block: Block) -> Block:
    """λ that keeps Q of order one, and float32 numbers in it, so that float64 can have the same."""
    for name, t in block.structure.fishleg_aux.items():
        t.copy_((t / t.shape[-1] ** 0.5 if name[0] in "RL" else t).float())
    for part in block.parts:
        part.param.copy_(part.param.float())
    return block


def pair(make: Maker, **group: object) -> tuple[list[Block], list[Block]]:
    """The same blocks in float64, for the reference, and in float32, for the kernels, poisoned."""
    exact, ours = make(torch.float64, **group), make(torch.float32, **group)
    for a, b in zip(exact, ours, strict=True):
        for name, t in a.structure.fishleg_aux.items():
            b.structure.fishleg_aux[name].copy_(t)
    poison(ours)
    return exact, ours


def matrices(blocks: list[Block], seed: int) -> list[Tensor]:
    return [randn(*b.shape, seed=1000 * seed + i).float() for i, b in enumerate(blocks)]


def products(block: Block) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(P, S, A) of each term in float64, from λ."""
    aux = {k: t.double() for k, t in block.structure.fishleg_aux.items()}
    A = aux.get("A", torch.ones(block.shape, dtype=torch.float64))
    names = [k[1:] for k in aux if k[0] == "R"]
    return [(aux["R" + k].T @ aux["R" + k], aux["L" + k] @ aux["L" + k].T, A) for k in names]


def dense_qv(block: Block, u: Tensor) -> Tensor:
    if isinstance(block.structure, Diagonal):
        return block.structure.fishleg_aux["d"].double() ** 2 * u.double()
    if isinstance(block.structure, DiagKron):
        R, L, A, B = (block.structure.fishleg_aux[name].double() for name in "RLAB")
        return A * torch.linalg.multi_dot([R.T, B**2 * torch.linalg.multi_dot([R, A * u.double(), L]), L.T])
    return sum(A * (P @ (A * u.double()) @ S) for P, S, A in products(block))


# Q u


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
    steps.lambda_step(exact, *[[x.double() for x in xs] for xs in (us, vs, fvs)], **options)
    before = [{k: t.clone() for k, t in b.structure.fishleg_aux.items()} for b in ours]
    backend.lambda_step(ours, us, vs, fvs, **options)
    assert_learned(exact, ours, before)
    old = [theta(b) for b in exact]
    norms, _ = steps.theta_step(exact, [u.double() for u in us])
    got, _ = backend.theta_step(ours, us)
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
    vs = backend.qv(blocks, [Split(b, c) for b in blocks])
    for b, v in zip(blocks, vs, strict=True):
        assert relative(v, dense_qv(b, 0.25 * b.matrix(b.grads))) <= CLOSE, b.shape


def test_thin_and_uncovered_blocks_go_to_the_reference() -> None:
    blocks = [tamed(make_block(Kron(6, 5, dtype=torch.float32), [randn(6, 5).float()])), all_blocks(torch.float32)[-1]]
    thin = Thin(randn(2, 6).float(), randn(2, 5).float())
    assert backend_kind(blocks[1]) is None
    v, w = backend.qv(blocks, [thin, randn(6, 5).float()])
    assert isinstance(v, Thin) and relative(v.dense, dense_qv(blocks[0], thin.dense)) <= CLOSE
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
    splits = [Split(b) for b in blocks]
    assert (
        relative(backend.inner(splits, splits), sum((b.matrix(b.grads).double() ** 2).sum() for b in blocks)) <= CLOSE
    )
    scaled = [Split(b, torch.tensor(0.5)) for b in blocks]
    assert relative(backend.inner(scaled, splits), 0.5 * steps.inner(splits, splits)) <= CLOSE
    thin = Thin(randn(2, 6).float(), randn(2, 5).float())
    assert relative(backend.inner([thin, xs[0]], [thin, xs[0]]), steps.inner([thin, xs[0]], [thin, xs[0]])) <= CLOSE


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


# θ

THETA_LAUNCHES = {"rms": 3, "trust": 3, None: 2}


@pytest.mark.parametrize("normalize", ["rms", "trust", None])
@pytest.mark.parametrize("momentum", ["before", "after"])
@pytest.mark.parametrize(
    ("capturable", "nesterov", "make"),
    [(False, True, all_blocks), (True, False, kron_blocks), (True, False, diagkron_blocks)],
)
def test_theta_step(
    make: Maker, nesterov: bool, capturable: bool, momentum: str, normalize: str | None, launches: list[str]
) -> None:
    """Two steps against float64; λ changes before the last."""
    exact, ours = pair(make, weight_decay=0.1, beta=0.8, lr=0.05)
    options = {"momentum": momentum, "normalize": normalize, "nesterov": nesterov, "kappa": 1e-2}
    before = [theta(b) for b in exact]
    for step in (1, 2):
        if step == 2:
            for a, b in zip(exact, ours, strict=True):
                next(iter(a.structure.fishleg_aux.values())).mul_(2)
                next(iter(b.structure.fishleg_aux.values())).mul_(2)
        launches.clear()
        versions = [b.parts[0].param._version for b in ours]
        gs = matrices(ours, step)
        want, _ = steps.theta_step(exact, [g.double() for g in gs], **options, capturable=capturable)
        norms, ok = backend.theta_step(ours, gs, **options, capturable=capturable)
        assert ok and ok.dtype == torch.bool and relative(norms, want) <= CLOSE
        assert all(b.parts[0].param._version > v for b, v in zip(ours, versions, strict=True))
    made = ["copy_kernel", "refresh_kernel"]
    assert [name for name in launches if name in made] == {all_blocks: made, kron_blocks: made[1:]}.get(make, made[:1])
    launches = [name for name in launches if name not in made]
    assert len(launches) == {all_blocks: 6, kron_blocks: THETA_LAUNCHES[normalize], diagkron_blocks: 5}[make], launches
    for a, b, old in zip(exact, ours, before, strict=True):
        assert relative(theta(b) - old, theta(a) - old) <= CLOSE, b.shape
        assert relative(b.momentum, a.momentum) <= CLOSE and b.step == 2


@pytest.mark.parametrize(
    ("normalize", "make", "bad", "capturable"),
    [("rms", all_blocks, math.nan, False), ("trust", all_blocks, math.inf, True), (None, kron_blocks, math.inf, False)],
)
def test_a_gradient_that_is_not_finite_writes_nothing(make: Maker, normalize, bad: float, capturable: bool) -> None:
    _, blocks = pair(make)
    backend.theta_step(blocks, matrices(blocks, 1), normalize=normalize, capturable=capturable)
    before = everything(blocks)
    for index in (0, len(blocks) - 2, len(blocks) - 1):  # Kron's and DiagKron's kernels, and the reference's blocks
        gs = matrices(blocks, 2)
        gs[index][0, 0] = bad
        _, ok = backend.theta_step(blocks, gs, normalize=normalize, capturable=capturable)
        assert not ok
        assert_same(before, blocks)
    _, ok = backend.theta_step(blocks, matrices(blocks, 2), normalize=normalize, capturable=capturable)
    assert ok and all(b.step == 2 for b in blocks)


def test_zero_gradient_moves_nothing_but_the_decay() -> None:
    exact, ours = pair(all_blocks, weight_decay=0.5)
    gs = matrices(ours, 1)
    for zeros in (False, True):  # what is left of m does not move θ either
        before = [theta(b) for b in ours]
        gs = [torch.zeros_like(g) if zeros else g for g in gs]
        norms, ok = backend.theta_step(ours, gs)
        assert ok and bool(norms.all())
    for b, old in zip(ours, before, strict=True):
        assert relative(theta(b), 0.95 * old) <= 1e-6
    steps.theta_step(exact, [g.double() for g in matrices(exact, 1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_parameters_and_layouts(dtype: torch.dtype) -> None:
    """bfloat16 parameters in every layout, gradients in place, some missing, a group for each part, a tensor lr."""
    o = {"dtype": torch.float32}
    params = [
        [randn(12, 6, dtype=dtype).T, randn(6, dtype=dtype)],
        [randn(8, 3, 3, 3, dtype=dtype).to(memory_format=torch.channels_last), randn(8, dtype=dtype)],
        [randn(5, 3, dtype=dtype), randn(4, dtype=dtype)],
        [randn(7, 5, dtype=dtype).T, randn(5, dtype=dtype)],
    ]
    makes = [lambda: Kron(6, 13, **o), lambda: Kron(8, 28, **o), lambda: Diagonal((19, 1), **o)]
    makes.append(lambda: DiagKron(5, 8, **o))
    two = []
    for _ in range(2):
        blocks = []
        for k, (make, ps) in enumerate(zip(makes, params, strict=True)):
            block = tamed(make_block(make(), copy.deepcopy(ps), int(k != 2), k, weight_decay=0.1))
            other = {**block.groups[0], "lr": torch.tensor(0.2), "weight_decay": 0.3}
            block.groups = [block.groups[0], other]
            block.grads = [randn(*p.shape, seed=9, dtype=dtype) for p in ps]
            blocks.append(block)
        blocks[1].grads[1] = None
        two.append(blocks)
    poison(two[1])
    for b in two[0]:
        for part in b.parts:
            part.param.data = part.param.data.float()
    before = [theta(b) for b in two[0]]
    steps.theta_step(two[0], [Split(b) for b in two[0]])
    backend.theta_step(two[1], [Split(b) for b in two[1]])
    for a, b, old in zip(*two, before, strict=True):
        assert b.parts[0].param.dtype == dtype and b.parts[0].param.stride() == a.parts[0].param.stride()
        moved = relative(theta(a), old)
        assert moved > 0.015 and relative(theta(b), theta(a)) <= max(torch.finfo(dtype).eps, CLOSE * moved)
    assert torch.equal(two[1][1].parts[1].param, params[1][1])  # its gradient is missing


def test_plans_follow_what_changes() -> None:
    """Step after step on the same tensors, of which a plan is kept; then lr, gradients and parameters change places."""
    exact, ours = pair(factored_blocks, lr=0.05)
    gs = [[p.detach().clone() for p in (part.param for part in b.parts)] for b in ours]
    for step in range(6):
        for a, b, pieces in zip(exact, ours, gs, strict=True):
            if step == 2:
                a.groups[0]["lr"] = b.groups[0]["lr"] = 0.1
            if step == 3:  # another place
                b.parts[0].param.data = b.parts[0].param.data.clone()
                pieces[0] = pieces[0].clone()
                if "B" in (aux := b.structure.fishleg_aux):
                    aux["B"] = 2 * aux["B"]
                    a.structure.fishleg_aux["B"].mul_(2)
            pieces[0].mul_(-0.7)
            b.grads = [None if step == 4 and k else g for k, g in enumerate(pieces)]
            a.grads = [None if g is None else g.double() for g in b.grads]
        steps.theta_step(exact, [Split(a) for a in exact])
        backend.theta_step(ours, [Split(b) for b in ours])
        for a, b in zip(exact, ours, strict=True):
            assert relative(b.momentum, a.momentum) <= CLOSE and relative(theta(b), theta(a)) <= CLOSE, step


def test_nothing_is_kept_alive() -> None:
    """Neither blocks nor gradients, by plans and workspaces."""
    blocks = [tamed(make_block(m(3, 4, dtype=torch.float32), [randn(3, 4).float()])) for m in (Kron, DiagKron)]
    for b in blocks:
        b.grads = [g.clone() for g in b.grads]
    backend.theta_step(blocks, [Split(b) for b in blocks])
    us = [b.matrix(b.grads) for b in blocks]
    backend.lambda_step(blocks, us, us, us, damping=0.1, lr=0.01)
    gone = [weakref.ref(x) for b in blocks for x in (b, b.grads[0])]
    del blocks, us, b
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4


def test_large_blocks_are_multiplied_by_torch(monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> None:
    monkeypatch.setattr(configurations, "LIBRARY", 16)  # of which there are three
    exact, ours = pair(factored_blocks)
    gs = matrices(ours, 1)
    backend.refresh(ours)
    for b, g, v in zip(ours, gs, backend.qv(ours, gs), strict=True):
        assert relative(v, dense_qv(b, g)) <= CLOSE
    steps.theta_step(exact, [g.double() for g in gs], normalize="trust")
    backend.theta_step(ours, gs, normalize="trust")
    for a, b in zip(exact, ours, strict=True):
        assert relative(theta(b), theta(a)) <= CLOSE and relative(b.momentum, a.momentum) <= CLOSE
    assert launches.count("refresh_kernel") == 1  # P and S by half their tiles, of these blocks too
    assert sum(backend_kind(b) is None for b in ours) == 3 and launches.count("copy_kernel") == 1
    assert not configurations.library_product(64, 64, "bf16")


def test_rows_of_one_parameter() -> None:
    p, gs = nn.Parameter(randn(6, 3).float()), [randn(3, 3, seed=5).float(), randn(3, 3, seed=6).float()]
    old, blocks = p.detach().clone(), []
    for rows in (slice(0, 3), slice(3, 6)):
        block = tamed(make_block(Kron(3, 3, dtype=torch.float32), [randn(3, 3).float()], seed=rows.start))
        block.parts = [Part(p, rows)]
        blocks.append(block)
    backend.theta_step(blocks, gs, normalize=None)
    want = torch.cat([dense_qv(b, g) for b, g in zip(blocks, gs, strict=True)])
    assert relative(old - p, 0.1 * want) <= CLOSE


def test_momentum_with_padding() -> None:
    """As on a GPU: rows that begin at multiples of 16 elements."""
    exact, ours = pair(factored_blocks)
    for b in ours:
        m, n = b.shape
        b.momentum = torch.zeros(m, table.padded(n))[:, :n]
    for step in (1, 2):
        gs = matrices(ours, step)
        steps.theta_step(exact, [g.double() for g in gs])
        backend.theta_step(ours, gs)
    for a, b in zip(exact, ours, strict=True):
        assert relative(b.momentum, a.momentum) <= CLOSE and relative(theta(b), theta(a)) <= CLOSE


# λ


def aux_inputs(exact: list[Block], step: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """u, v and F v of every block, float32 numbers."""
    us = matrices(exact, step)
    us = [u / sum(x.square().sum() for x in us).sqrt() for u in us]
    vs = [v.float() for v in steps.qv(exact, [u.double() for u in us])]
    return us, vs, [0.5 * v + 0.1 * randn(*v.shape, seed=step).float() for v in vs]


def assert_learned(exact: list[Block], ours: list[Block], before: list[dict[str, Tensor]]) -> None:
    """λ moved as the reference's, its moments are the same; then the reference gets ours, to go on from there."""
    for a, b, old in zip(exact, ours, before, strict=True):
        for name, t in b.structure.fishleg_aux.items():
            target, case = a.structure.fishleg_aux[name], (b.shape, name)
            assert relative(b.exp_avg[name], a.exp_avg[name]) <= CLOSE * 10, case
            assert relative(b.exp_avg_sq[name], a.exp_avg_sq[name]) <= CLOSE * 10, case
            moved = (target - old[name]).norm()
            assert (t - target).norm() <= 1e-3 * moved + 1e-7 * target.norm() < 0.1 * moved, case
            target.copy_(t), a.exp_avg[name].copy_(b.exp_avg[name]), a.exp_avg_sq[name].copy_(b.exp_avg_sq[name])


@pytest.mark.parametrize(
    ("whole", "capturable", "learn_scale", "precondition"),
    [(True, False, True, False), (False, True, False, False), (True, True, False, True), (False, False, True, True)],
)
def test_lambda_step(whole: bool, capturable: bool, learn_scale: bool, precondition: bool, launches: list[str]) -> None:
    """Two steps against float64, whose λ is set to ours in between: Adam amplifies what differs where ∂λ vanishes."""
    exact, ours = pair(all_blocks if whole else lambda dtype, **o: kron_blocks(dtype, scaled=False, **o))
    options = {"damping": 0.1, "lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-4, "capturable": capturable}
    options |= {"precondition": precondition, "learn_scale": learn_scale}
    for step in (1, 2):
        us, vs, fvs = aux_inputs(exact, step)
        before = [{k: t.clone() for k, t in b.structure.fishleg_aux.items()} for b in ours]
        wide = [[x.double() for x in xs] for xs in (us, vs, fvs)]
        want, _ = steps.lambda_step(exact, *wide, **options)
        backend.refresh(ours)
        launches.clear()
        versions = [b.structure.version for b in ours]
        loss, ok = backend.lambda_step(ours, us, vs, fvs, **options)
        assert ok and relative(loss, want) <= CLOSE
        assert all(b.aux_step == step and b.structure.version != v for b, v in zip(ours, versions, strict=True))
        assert_learned(exact, ours, before)
    assert len(launches) == 4 + 2 * whole + 2 * precondition + (not learn_scale), launches
    launches.clear()
    for b in (b for b in ours if backend_kind(b) == "kron"):  # P and S are those of the new λ, and known to be
        assert relative(b.structure.Qv(us[0].new_ones(b.shape)), dense_qv(b, us[0].new_ones(b.shape))) <= CLOSE
    backend.refresh([b for b in ours if "A" not in b.structure.fishleg_aux])
    assert launches == []


@pytest.mark.parametrize(
    ("where", "capturable"), [("u", False), ("fv", True), ("reference", False), ("overflow", True), ("zero", False)]
)
def test_lambda_step_refuses(where: str, capturable: bool) -> None:
    """What is not finite, or a zero direction, writes nothing, P and S included."""
    exact, blocks = pair(all_blocks)
    us, vs, fvs = aux_inputs(exact, 1)
    if where == "zero":
        us = [torch.zeros_like(u) for u in us]
    if where == "overflow":
        us, vs, fvs = ([x * 1e20 for x in xs] for xs in (us, vs, fvs))
    if where == "u":
        us[0][0, 0] = NAN
    if where == "fv":
        fvs[6][0] = math.inf
    if where == "reference":
        fvs[-1][0] = math.inf
    before = everything(blocks)
    _, ok = backend.lambda_step(blocks, us, vs, fvs, damping=0.1, lr=0.1, capturable=capturable)
    assert not ok
    assert_same(before, blocks)
    x = torch.ones(blocks[0].shape)
    assert relative(blocks[0].structure.Qv(x), dense_qv(blocks[0], x)) <= CLOSE


def test_split_directions() -> None:
    """u as the optimizer hands it over: the gradient where the parameters hold it, times a device scalar."""
    exact, ours = pair(lambda dtype, **o: kron_blocks(dtype, scaled=False, **o))
    c = torch.tensor(0.1)
    us = [c * b.matrix(b.grads) for b in ours]
    vs = [v.float() for v in steps.qv(exact, [u.double() for u in us])]
    options = {"damping": 0.3, "lr": 0.01, "eps": 1e-4}
    steps.lambda_step(exact, [u.double() for u in us], [v.double() for v in vs], [v.double() for v in vs], **options)
    backend.lambda_step(ours, [Split(b, c) for b in ours], vs, vs, **options)
    for a, b in zip(exact, ours, strict=True):
        for name, t in b.structure.fishleg_aux.items():
            assert relative(t, a.structure.fishleg_aux[name]) <= CLOSE


# The whole


def trained(name: str | None, structure: str | dict[str, str], count: int, **options: object) -> tuple[Tensor, FishLeg]:
    """Parameters after ``count`` steps of a small convolutional net with norms."""
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 6, 3).to(memory_format=torch.channels_last)
    net = nn.Sequential(nn.Unflatten(1, (1, 4, 5)), conv, nn.Tanh(), nn.Flatten(), nn.LayerNorm(36), nn.Linear(36, 5))
    x, y = torch.randn(24, 20), torch.randint(0, 5, (24,))
    likelihood = CategoricalLikelihood()
    opt = FishLeg(
        net, likelihood=likelihood, backend=name, structure=structure, update_aux_every=2, anchor_every=7,
        precision="highest", weight_decay=0.01, **options,
    )  # fmt: skip
    with torch.enable_grad():
        for _ in range(count):
            opt.zero_grad()
            likelihood.nll(y, opt.model(x)).backward()
            opt.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()]), opt


@pytest.mark.parametrize(
    ("structure", "options"),
    [
        ("kron", {}),
        (
            {"1": "sumkron", "5": "diagkron"},
            {"thin_gradients": False, "normalize": None, "lr": 1e-3, "capturable": True},
        ),
    ],
)
def test_trajectory(structure: str | dict[str, str], options: dict) -> None:
    """20 steps, 10 updates of λ and 3 anchorings: θ within 1e-5 of the reference's distance from the start."""
    torch.use_deterministic_algorithms(False)
    start, _ = trained("reference", structure, 0, **options)
    want, _ = trained("reference", structure, 20, **options)
    got, opt = trained("triton", structure, 20, **options)
    assert opt.backend == "triton" and opt.diagnostics()["skipped_steps"] == 0
    assert relative(got - start, want - start) <= 1e-5


def test_it_runs_on_a_cpu_only_where_it_is_named() -> None:
    assert backends.available("triton", torch.device("cpu"), torch.float32) == (True, "interpreted, for tests")
    assert trained(None, "kron", 0)[1].backend != "triton"
