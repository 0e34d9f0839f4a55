"""Thin gradients: what is computed of EᵀH is what is computed of the dense matrix, and cheaper where it is chosen."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from dense import dense_q, flat, randn, randomise, relative
from test_reference_steps import assert_same, everything, fisher_products, make_block, split, theta
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fishleg_fast import BernoulliLikelihood, DiagKron, FishLeg, GaussianLikelihood, Kron, SumKron, precision
from fishleg_fast.reference import steps  # or the ops of another backend, by each_backend
from fishleg_fast.reference.thin import Image, Sum, Thin, dot, forms, is_zero, outer_pays, thin_pays, vectors

EXACT = 1e-10
MAKERS = {"kron": Kron, "sumkron2": SumKron, "sumkron3": partial(SumKron, terms=3)}
LAYOUTS = {
    "dense": {},
    "R-diagonal": {"diagonal": ("R",)},
    "L-diagonal": {"diagonal": ("L",)},
    "both-diagonal": {"diagonal": ("R", "L")},
    "blocks": {"max_factor_size": 4},  # 11 -> 3 of 4, padded; 13 -> 4 of 4
    "L-dense": {"max_factor_size": 5},
    "R-diagonal-blocks": {"diagonal": ("R",), "max_factor_size": 4},
}
SHAPES = [(1, 1), (1, 7), (7, 1), (9, 5), (11, 13)]
FORMED = {"both": None, "neither": (0, 0), "P": (99, 0), "S": (0, 99)}  # by how many vectors P and S will meet


def thin_matrix(rank: int, shape: tuple[int, int], seed: int = 0) -> Thin:
    return Thin(randn(rank, shape[0], seed=seed), randn(rank, shape[1], seed=seed + 1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MAKERS)
def test_products_and_gradients_match_the_dense_matrix(kind: str, layout: str, shape: tuple[int, int]) -> None:
    """Whichever of P and S are formed, for ranks below and above the sizes, and w with thin terms or without."""
    structure = MAKERS[kind](*shape, **LAYOUTS[layout], dtype=torch.float64)
    randomise(structure, seed=1)
    Q = dense_q(structure, structure.fishleg_aux)
    leaves = {name: t.clone().requires_grad_() for name, t in structure.fishleg_aux.items()}
    for rank, terms in [(1, 1), (1, 2), (3, 1), (20, 2)]:  # w without a dense matrix, for rank 3
        u = thin_matrix(rank, shape, seed=2)
        extra = tuple(thin_matrix(2 + k, shape, seed=5 + 2 * k) for k in range(terms))
        dense = [randn(*shape, seed=4)] if rank != 3 else []
        w = Sum.of(*dense, *extra)
        U, W = u.E.T @ u.H, sum(dense, sum(t.E.T @ t.H for t in extra))
        Qu = (Q @ U.reshape(-1)).reshape(shape)
        s = W.reshape(-1) @ dense_q(structure, leaves) @ U.reshape(-1)
        want = dict(zip(leaves, torch.autograd.grad(s, list(leaves.values())), strict=True))
        for formed, uses in FORMED.items():
            next(iter(structure.fishleg_aux.values())).mul_(1)  # λ was written to: nothing is formed
            structure.refresh(uses)
            names = {name[0] for name in structure.cache}
            whole = {p for p, name in zip("PS", list(leaves)[:2], strict=True) if leaves[name].ndim > 1}
            assert names & whole == {"both": whole, "neither": set()}.get(formed, {formed} & whole)
            image = structure.thin_product(u)
            assert isinstance(image, Image) and relative(image.E.T @ image.H, Qu) <= EXACT
            assert relative(structure.product(U), Qu) <= EXACT
            found = [structure.thin_gradients(u, image, w), structure.gradients(U, W)]
            found.append(structure.thin_gradients(u, Image(image.E, image.H), w))  # without the halves
            for got, name in itertools.product(found, want):
                assert relative(got[name], want[name]) <= EXACT, (formed, rank, terms, name)
    assert layout != "dense" or shape[1] < 13 or outer_pays(got[name], 1) > outer_pays(got[name], 20)  # both were met


def test_a_cache_made_in_inference_mode_does_not_stand_in_the_way() -> None:
    structure, u = Kron(6, 4, dtype=torch.float64), randn(6, 4)
    with torch.inference_mode():
        structure.Qv(u)
    structure.fishleg_aux["R"].mul_(2)
    assert relative(structure.Qv(u), 4 * u) <= EXACT


def test_algebra() -> None:
    shape = (5, 7)
    x, y, a, b = thin_matrix(3, shape), thin_matrix(9, shape, seed=2), randn(*shape, seed=4), randn(*shape, seed=5)
    X, Y = x.E.T @ x.H, y.E.T @ y.H
    assert x.shape == shape and x.rank == 3
    assert relative(x.dense, X) <= EXACT and relative(x.scaled(-2).dense, -2 * X) <= EXACT
    pairs = [(x, X, y, Y), (x, X, b, b), (a, a, y, Y), (a, a, b, b), (x, X, x, X), (a, a, a, a)]
    for p, P, q, R in pairs:
        assert relative(dot(p, q), (P * R).sum()) <= EXACT
    want = sum((P * R).sum() for _, P, _, R in pairs)
    assert relative(steps.inner([p for p, *_ in pairs], [q for *_, q, _ in pairs]), want) <= EXACT
    assert relative(steps.inner([a.float(), x], [b.float(), y]), (a * b).sum() + (X * Y).sum()) <= 1e-6
    for terms, whole in [((x,), X), ((a, x), a + X), ((x, a, y), a + X + Y)]:
        w, left, right = Sum.of(*terms), randn(4, 5, seed=6), randn(4, 7, seed=7)
        assert relative(w.left(left), left @ whole) <= EXACT and relative(w.right(right), right @ whole.T) <= EXACT
        assert w.to(torch.float32).left(left.float()).dtype == torch.float32
        assert (w.whole is a) == any(t is a for t in terms)
    out = torch.full(shape, float("nan"), dtype=torch.float64)
    x.to(torch.float32).into(out)
    assert relative(out, X) <= 1e-6
    for value, zero in {1.0: 0, -1.0: 0, -0.0: 1, float("nan"): 0, float("-inf"): 0, 5e-324: 0}.items():
        z = torch.zeros(3, 4, dtype=torch.float64)
        z[1, 2] = value
        assert bool(is_zero(z)) == zero, value
    assert is_zero(torch.zeros(0, 3))


def applied(factor: Tensor, columns: int) -> int:
    """Multiply-adds of a factor with a matrix of so many columns, one scalar after another."""
    blocks, width = {1: (len(factor), 1), 2: (1, len(factor)), 3: (len(factor), factor.shape[-1])}[factor.ndim]
    return sum(columns for _ in range(blocks) for _ in range(width) for _ in range(width))


def counted(function: Callable[[], object]) -> int:
    """Multiply-adds of all matrix products in it."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_cheaper_route_is_taken(layout: str) -> None:
    decisions = set()
    for m, n, rank in itertools.product((1, 2, 6, 17), (1, 2, 6, 17), (1, 2, 3, 5, 8, 12, 30)):
        structure, u, U = Kron(m, n, **LAYOUTS[layout]), thin_matrix(rank, (m, n)).to(torch.float32), torch.ones(m, n)
        R, L = structure.fishleg_aux.values()
        thin, dense = applied(R, rank) + applied(L, rank) + m * n * rank, applied(R, n) + applied(L, m)
        assert thin_pays(R, L, m, n, rank) == (thin < dense)
        decisions.add(thin < dense)
        if "diagonal" not in layout and rank == 3:  # FlopCounterMode does not see elementwise products
            structure.refresh()
            assert counted(lambda: structure.thin_product(u).into(torch.empty(m, n))) == thin  # noqa: B023
            assert counted(lambda: structure.product(U)) == dense  # noqa: B023
        for factor, k in ((R, m), (L, n)):
            form, without = applied(factor, factor.shape[-1]), 2 * applied(factor, rank)
            assert forms(factor, None) and forms(factor, rank) == (factor.ndim == 1 or form + without // 2 <= without)
            square = rank * k * k
            assert outer_pays(factor, rank) == (factor.ndim == 2 and 4 * square < square + k**3)
        assert vectors(u, 4, 2) == (4 * rank + 2 * n, 4 * rank + 2 * m) and vectors(U, 4, 2) == (6 * n, 6 * m)
    assert decisions == {True, False} or "diagonal" in layout


def step_blocks(**group: object) -> list:
    """A layer with a bias, sums of two terms, factors in blocks, and a structure without a thin form."""
    w = {"dtype": torch.float64}
    return [
        make_block(Kron(9, 7, **w), [randn(9, 6), randn(9, seed=1)], **group),
        make_block(SumKron(8, 8, **w), [randn(8, 8, seed=2)], seed=1, **group),
        make_block(Kron(10, 6, max_factor_size=4, diagonal=("L",), **w), [randn(10, 6, seed=3)], seed=2, **group),
        make_block(DiagKron(3, 4, **w), [randn(3, 4, seed=4)], seed=3, **group),
    ]


def step_gradients(blocks: list, step: int) -> list[Thin | Tensor]:
    """Thin ones, but for the last block, and for another one at every third step."""
    gs = [thin_matrix(1 + step % 3, b.shape, seed=100 * step + 10 * i) for i, b in enumerate(blocks)]
    return [g if i < 3 and (step % 3 or i != step // 3 % 3) else g.dense for i, g in enumerate(gs)]


def take(blocks: list, gs: list[Thin | Tensor], thin: bool, **options: object) -> tuple[Tensor, Tensor]:
    for b, g in zip(blocks, gs, strict=True):
        b.grads = b.split(g.dense if isinstance(g, Thin) else g)
    dense = [g.dense if isinstance(g, Thin) else g for g in gs]
    with torch.no_grad():
        return steps.theta_step(blocks, gs if thin else dense, **options)


GRID = [(0.9, *rest) for rest in itertools.product(("before", "after"), (False, True), ("rms", "trust", None))]
GRID += [(0.0, *rest, "rms") for rest in itertools.product(("before", "after"), (False, True))]


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize(("beta", "momentum", "nesterov", "normalize"), GRID)
def test_theta_steps_are_those_of_dense_gradients(beta: float, momentum: str, nesterov: bool, normalize) -> None:
    """With steps in between that are dense or not finite, λ written to now and then, P and S formed or not."""
    options = {"momentum": momentum, "nesterov": nesterov, "normalize": normalize, "kappa": 1e-2}
    group = {"weight_decay": 0.1, "lr": 0.02, "beta": beta}
    thin, dense = step_blocks(**group), step_blocks(**group)
    for step in range(27):
        if step in (4, 5, 13):
            for b in [*thin, *dense]:
                b.structure.fishleg_aux[list(b.structure.fishleg_aux)[step % 2]].mul_(1.1)
        if step % 4 == 0:
            steps.refresh(thin, [list(FORMED.values())[step // 4 % 4]] * 4)
        gs = step_gradients(thin, step)
        if step in (7, 20):
            before, broken = everything(thin), [Thin(g.E / 0, g.H) if isinstance(g, Thin) else g for g in gs]
            _, ok = take(thin, broken[: step % 3 + 1] + gs[step % 3 + 1 :], True, **options)
            assert not ok
            assert_same(before, thin)
            for b in thin:  # what is known of Q m is still so
                assert not b.product_known or relative(b.product, b.structure.product(b.momentum)) <= EXACT
        (norms, ok), (want, _) = take(thin, gs, True, **options), take(dense, gs, False, **options)
        assert ok and relative(norms, want) <= EXACT
        for b, twin, g in zip(thin, dense, gs, strict=True):
            assert relative(theta(b), theta(twin)) <= EXACT and relative(b.momentum, twin.momentum) <= EXACT
            assert b.step == twin.step == step + 1
            assert b.product_known == (isinstance(g, Thin) and momentum == "before")
            if b.product_known:
                Q = dense_q(b.structure, b.structure.fishleg_aux)
                assert relative(b.product.reshape(-1), Q @ b.momentum.reshape(-1)) <= EXACT


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.parametrize("learn_scale", [False, True])
def test_lambda_steps_are_those_of_dense_gradients(learn_scale: bool, precondition: bool) -> None:
    options = {"damping": 0.3, "lr": 0.01, "eps": 1e-4, "learn_scale": learn_scale, "precondition": precondition}
    thin, dense = step_blocks(), step_blocks()
    F = fisher_products(thin)
    with torch.no_grad():
        for step in range(6):
            us = [u.scaled(0.02) if isinstance(u, Thin) else 0.02 * u for u in step_gradients(thin, step)]
            steps.refresh(thin, [list(FORMED.values())[step % 4]] * 4)
            found = []
            for blocks, directions in ((thin, us), (dense, [u.dense if isinstance(u, Thin) else u for u in us])):
                vs = steps.qv(blocks, directions)
                fvs = split(F @ flat([v.dense if isinstance(v, Thin) else v for v in vs]), blocks)
                found.append(steps.lambda_step(blocks, directions, vs, fvs, **options)[0])
            assert relative(*found) <= EXACT
            for b, twin in zip(thin, dense, strict=True):
                for name, t in twin.structure.fishleg_aux.items():
                    assert relative(b.structure.fishleg_aux[name], t) <= EXACT, (step, name)
                assert b.aux_step == step + 1


def autoencoder(bias: bool = True) -> nn.Sequential:
    sizes = [40, 60, 30, 60, 40]
    layers = [[nn.Linear(n, m, bias=bias), nn.Tanh()] for n, m in itertools.pairwise(sizes)]
    return nn.Sequential(*[module for pair in layers for module in pair][:-1])


def twice() -> nn.Sequential:
    inner = nn.Linear(40, 40)
    return nn.Sequential(inner, nn.Tanh(), inner, nn.Tanh(), nn.Linear(40, 40))


def train(
    net: nn.Module, optimizer: FishLeg, span: range, time: tuple = (), sizes: tuple = (6,), bias: bool = True
) -> list[bool | None]:
    """Whether the gradients of all matrices were thin, of each step; None where those of some were."""
    was, gather, maximize = [], FishLeg._gather, optimizer.defaults["maximize"]

    def spy() -> tuple:
        blocks, gs = gather(optimizer)
        kinds = {isinstance(g, Thin) for g in gs if min(g.shape) > 1}
        was.append(kinds.pop() if len(kinds) == 1 else None)
        return blocks, gs

    optimizer._gather = spy
    for step in span:
        x = randn(sizes[step % len(sizes)], *time, 40, seed=step).sigmoid().to(next(net.parameters()).dtype)
        optimizer.zero_grad()
        loss = optimizer.likelihood.nll(x, net(x))
        (-loss if maximize else loss).backward()
        for p in net.parameters():
            p.grad = p.grad if bias or p.ndim > 1 else None
        optimizer.step()
    return was


def make(thin: bool = True, build: Callable[[], nn.Module] = autoencoder, dtype=torch.float64, **options) -> tuple:
    """A large aux_eps, since Adam on λ blows up gradients that are nothing but rounding."""
    torch.manual_seed(0)
    net = build().to(dtype)
    if params := options.pop("params", None):
        options["params"] = params(net)
    likelihood = options.pop("likelihood", GaussianLikelihood)()
    options = {"update_aux_every": 3, "anchor_every": 6, "aux_eps": 1e-3, "aux_lr": 1e-2, "lr": 5e-3, **options}
    return net, FishLeg(net, likelihood=likelihood, thin_gradients=thin, **options)


def state(optimizer: FishLeg) -> Tensor:
    aux = [t for b in optimizer.blocks for t in (*b.structure.fishleg_aux.values(), b.momentum)]
    return flat([p.detach() for group in optimizer.param_groups for p in group["params"]] + aux)


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
    for thin in (True, False):
        net, optimizer = make(thin, **options)
        start = state(optimizer)
        was, all_sizes = train(net, optimizer, range(25), **data), itertools.cycle(data.get("sizes", (6,)))
        assert was == [thin and size < 50 and "dense" not in name for _, size in zip(was, all_sizes, strict=False)]
        assert optimizer.diagnostics()["steps"] == 25 and optimizer.diagnostics()["skipped_aux_steps"] == 0
        states.append(state(optimizer))
    assert relative(*states) <= EXACT and relative(start, states[0]) > 0.01


@pytest.mark.parametrize("sizes", [(6,), (6, 50, 1)], ids=["even", "uneven"])
@pytest.mark.parametrize("at", [5, 8, 9])
def test_resuming_is_bit_for_bit(at: int, sizes: tuple) -> None:
    """... and but for rounding with a checkpoint of the other kind of gradients, in the midst of λ's cycle or not."""
    saved, ends = {}, {}
    for thin in (True, False):
        net, optimizer = make(thin, update_aux_every=4, anchor_every=8)
        train(net, optimizer, range(at), sizes=sizes)
        torch.save((net.state_dict(), optimizer.state_dict()), buffer := io.BytesIO())
        train(net, optimizer, range(at, at + 6), sizes=sizes)
        saved[thin], ends[thin] = buffer.getvalue(), state(optimizer)
    for (origin, checkpoint), thin in itertools.product(saved.items(), (True, False)):
        net, optimizer = make(thin, update_aux_every=4, anchor_every=8)
        train(net, optimizer, range(2))  # a state to be overwritten
        weights, kept = torch.load(io.BytesIO(checkpoint), weights_only=True)
        net.load_state_dict(weights)
        optimizer.load_state_dict(kept)
        train(net, optimizer, range(at, at + 6), sizes=sizes)
        assert relative(state(optimizer), ends[origin]) <= EXACT
        assert thin != origin or torch.equal(state(optimizer), ends[origin])


def settings_of_torch() -> tuple[str, str, str]:
    matmul = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    return matmul[0].fp32_precision, matmul[1].fp32_precision, torch.get_float32_matmul_precision()


@pytest.fixture
def users_setting() -> Iterator[Callable[[str], None]]:
    """Sets torch's own precision, and puts it back."""
    before = settings_of_torch()
    yield torch.set_float32_matmul_precision
    torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before[:2]


bfloat16 = pytest.mark.skipif(not precision._fast_bfloat16(), reason="the CPU has no bfloat16 products")


@bfloat16
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MAKERS)
def test_medium_precision_is_that_of_bfloat16(kind: str, layout: str) -> None:
    shape = (33, 29)
    structure = MAKERS[kind](*shape, **LAYOUTS[layout], dtype=torch.float32)
    for k, t in enumerate(structure.fishleg_aux.values()):  # well-conditioned
        t.add_(0.1 * randn(*t.shape, seed=k).float() / t.shape[-1] ** 0.5)
    summed = Sum.of(randn(*shape, seed=9), thin_matrix(2, shape, seed=10))
    u, U, w = (x.to(torch.float32) for x in (thin_matrix(4, shape), randn(*shape, seed=8), summed))
    W = w.whole + w.thin.dense
    exact = [structure.thin_product(u).dense, structure.product(U)]
    exact += [*structure.gradients(u.dense, W).values(), *structure.gradients(U, W).values()]
    structure.operands = precision.operand_dtype("medium", torch.device("cpu"), torch.float32)
    for uses in FORMED.values():
        next(iter(structure.fishleg_aux.values())).mul_(1)
        structure.refresh(uses)
        got = [structure.thin_product(u).dense, structure.product(U)]
        got += [
            *structure.thin_gradients(u, structure.thin_product(u), w).values(),
            *structure.gradients(U, W).values(),
        ]
        for k, (x, y) in enumerate(zip(got, exact, strict=True)):
            assert 1e-5 < relative(x, y) < 2e-2, k


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
        assert (optimizer.blocks[0].structure.operands == torch.bfloat16) == rounded
        optimizer.blocks[0].structure.fishleg_aux["R"].fill_(float("nan"))
        with pytest.raises(RuntimeError, match="is not finite"):
            optimizer.step()
        note()
    assert len(found) == 32 and found[::2] == found[1::2]
    assert 1e-5 < relative(*states) < 0.2 if rounded else torch.equal(*states)
