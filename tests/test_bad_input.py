"""Wrong arguments are named, with their value; what goes wrong in a step corrupts nothing."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fishleg_fast import BernoulliLikelihood, CategoricalLikelihood, FishLeg, FishModule, GaussianLikelihood, Likelihood
from fishleg_fast.algebra.structures.kron import Kron
from fishleg_fast.model.assemble import STRUCTURES

LIKELIHOOD = CategoricalLikelihood()


def make(**options) -> FishLeg:
    return FishLeg(nn.Linear(3, 2), likelihood=LIKELIHOOD, **options)


NUMBERS = {
    "lr": (-1.0, math.nan, math.inf),
    "aux_lr": (0.0, -1e-3, math.nan),
    "aux_eps": (0.0, -1.0, math.inf),
    "beta": (-0.1, 1.0, math.nan),
    "weight_decay": (-0.1, math.nan),
    "damping": (0.0, -1.0, math.nan, math.inf),
    "scale": (0.0, -2.0, math.nan),
    "kappa": (0.0, -1.0),
    "anchor_decay": (-0.1, 1.0, math.nan),
    "anchor_every": (-1,),
    "curvature_batch": (0, -5),
    "max_factor_size": (0,),
    "seed": (-1,),
    "aux_betas": ((0.9,), (0.9, 1.0), (-0.1, 0.9), 0.9),
    "fisher": ("exact", ""),
    "u_sampling": ("uniform",),
    "init": ("adam",),
    "momentum": ("nesterov",),
    "normalize": ("unit",),
    "precision": ("low",),
    "structure": ("kronecker", {"0": "nothing"}),
    "backend": ("tpu",),
}


@pytest.mark.parametrize("name, value", [(name, v) for name, values in NUMBERS.items() for v in values], ids=str)
def test_values_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*should be"):
        make(**{name: value})


TYPES = {
    "lr": "fast",
    "beta": True,
    "damping": "high",
    "update_aux_every": 2.5,
    "anchor_every": "often",
    "precondition_aux": 1,
    "maximize": "yes",
    "structure": 3,
    "writer": "log.txt",
    "seed": 1.5,
    "params": torch.zeros(2),
}


@pytest.mark.parametrize("name", TYPES)
def test_values_of_a_wrong_type_are_named(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}.*should"):
        make(**{name: TYPES[name]})


def test_bad_groups() -> None:
    net = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="lr should be"):
        FishLeg(net, likelihood=LIKELIHOOD, params=[{"params": net.parameters(), "lr": -1}])
    with pytest.raises(ValueError, match="parameters of the model"):
        FishLeg(net, likelihood=LIKELIHOOD, params=[nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="params should hold a parameter"):
        FishLeg(net, likelihood=LIKELIHOOD, params=[])
    with pytest.raises(ValueError, match="more than one parameter group"):
        FishLeg(net, likelihood=LIKELIHOOD, params=[{"params": [net.weight]}, {"params": [net.weight]}])


def nothing(*args: object) -> None:
    return None


@pytest.mark.parametrize(
    "args, kwargs, error, message",
    [
        ((nn.Linear(2, 2).parameters(),), {"likelihood": LIKELIHOOD}, TypeError, "model should be an nn"),
        ((nn.Linear(2, 2),), {}, ValueError, "likelihood=, or both"),
        ((nn.Linear(2, 2), nothing), {}, ValueError, "nll is missing"),
        ((nn.Linear(2, 2), None, nothing), {}, ValueError, "draw is missing"),
        ((nn.Linear(2, 2), LIKELIHOOD), {}, TypeError, "pass it as likelihood="),
        ((nn.Linear(2, 2), nothing, nothing, "categorical"), {}, TypeError, "likelihood should be"),
        ((nn.Linear(2, 2), nothing, nothing), {"fisher": "ggn"}, ValueError, "fisher='ggn' needs likelihood="),
        (
            (nn.Linear(2, 2),),
            {"likelihood": LIKELIHOOD, "aux_loader": []},
            ValueError,
            "aux_loader should not be empty",
        ),
        ((nn.Linear(2, 2),), {"likelihood": LIKELIHOOD, "aux_loader": 3}, TypeError, "aux_loader should be iterable"),
        ((nn.ReLU(),), {"likelihood": LIKELIHOOD}, ValueError, "trainable parameter"),
        ((nn.Linear(2, 2).requires_grad_(False),), {"likelihood": LIKELIHOOD}, ValueError, "requires_grad=False"),
        ((nn.LazyLinear(2),), {"likelihood": LIKELIHOOD}, ValueError, "not initialized yet"),
        ((nn.Linear(2, 2, dtype=torch.complex64),), {"likelihood": LIKELIHOOD}, TypeError, "real floating point"),
        (
            (nn.Linear(2, 2),),
            {"likelihood": LIKELIHOOD, "momentum": "after", "u_sampling": "momentum"},
            ValueError,
            "u_sampling='momentum'",
        ),
        (
            (nn.Linear(2, 2),),
            {"likelihood": LIKELIHOOD, "structure": lambda m, n, **k: None},
            TypeError,
            "should make a Structure",
        ),
        (
            (nn.Linear(2, 2),),
            {"likelihood": LIKELIHOOD, "structure": lambda m, n, **k: Kron(n, m)},
            TypeError,
            "should make a Structure of shape",
        ),
    ],
)
def test_wrong_sources(args: tuple, kwargs: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FishLeg(*args, **kwargs)


def test_an_exhausted_loader_is_a_clear_error() -> None:
    net = nn.Linear(3, 2)
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, aux_loader=(x for x in [torch.randn(4, 3)]), anchor_every=1)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    LIKELIHOOD.nll(y, net(x)).backward()
    with pytest.raises(ValueError, match="aux_loader gave no batch"):
        for _ in range(3):
            optimizer.step()


def test_a_step_before_any_input_says_what_to_do() -> None:
    net = nn.Linear(3, 2)
    optimizer = FishLeg(net, likelihood=LIKELIHOOD)
    net.weight.grad = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="no curvature batch yet"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="pass aux_loader"):
        optimizer.pretrain_aux(1)


def test_a_model_whose_layers_alone_are_called_is_told_of() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = FishLeg(net[:2], likelihood=LIKELIHOOD)
    LIKELIHOOD.nll(torch.tensor([0, 1]), net(torch.randn(2, 3))).backward()
    with pytest.raises(RuntimeError, match=r"FishLeg, Sequential, was not itself called .* that the loop calls"):
        optimizer.step()


def test_a_model_moved_after_the_optimizer_was_made() -> None:
    net = nn.Linear(3, 2)
    optimizer = FishLeg(net, likelihood=LIKELIHOOD)
    net.double()
    LIKELIHOOD.nll(torch.tensor([0, 1]), net(torch.randn(2, 3).double())).backward()
    with pytest.raises(RuntimeError, match="before making the optimizer"):
        optimizer.step()


class BadCustom(FishModule):
    """A FishModule that may be wrong in several ways."""

    def __init__(self, aux: object = None, out: object = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3))
        if aux is not None:
            self.fishleg_aux = aux
        self.out = out

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T

    def Qv(self, v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.out if self.out is not None else v


@pytest.mark.parametrize("aux", [None, {}, [torch.ones(2)]])
def test_a_custom_module_without_lambda(aux: object) -> None:
    with pytest.raises(TypeError, match=r"fishleg_aux should be an nn\.ParameterDict or a dict"):
        FishLeg(BadCustom(aux), likelihood=LIKELIHOOD)


def test_a_custom_module_with_bad_lambda_or_qv() -> None:
    with pytest.raises(ValueError, match=r"fishleg_aux\['d'\] should be a finite"):
        FishLeg(BadCustom({"d": torch.tensor([math.nan])}), likelihood=LIKELIHOOD)
    net = BadCustom({"d": torch.ones(1)}, out=(torch.ones(3),))
    optimizer = FishLeg(net, likelihood=LIKELIHOOD)
    LIKELIHOOD.nll(torch.tensor([0, 1]), net(torch.randn(2, 3))).backward()
    with pytest.raises(ValueError, match="Qv should return a tuple of shapes"):
        optimizer.step()
    with pytest.raises(TypeError, match="abstract"):
        type("NoQv", (FishModule,), {})()


def snapshot(net: nn.Module, optimizer: FishLeg) -> list[Tensor]:
    tensors = [*net.parameters()]
    for block in optimizer.blocks:
        tensors += [block.momentum, *block.structure.fishleg_aux.values(), *block.exp_avg.values()]
    return [t.detach().clone() for t in tensors]


def trained(**options) -> tuple[nn.Module, FishLeg, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, update_aux_every=1, **options)
    x, y = torch.randn(8, 3), torch.arange(8) % 2
    for _ in range(3):
        optimizer.zero_grad()
        LIKELIHOOD.nll(y, net(x)).backward()
        optimizer.step()
    optimizer.zero_grad()
    LIKELIHOOD.nll(y, net(x)).backward()
    return net, optimizer, x, y


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_skipped_counted_and_told_once(value: float) -> None:
    net, optimizer, x, y = trained()
    net[0].weight.grad[0, 0] = value
    before = snapshot(net, optimizer)
    with pytest.warns(UserWarning, match="the gradient is not finite"):
        optimizer.step()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(net, optimizer), strict=True))
    assert optimizer.diagnostics()["skipped_steps"] == 2
    optimizer.zero_grad()
    LIKELIHOOD.nll(y, net(x)).backward()
    optimizer.step()
    assert optimizer.diagnostics()["skipped_steps"] == 2 and optimizer.diagnostics()["steps"] == 4


def test_a_curvature_batch_that_is_not_finite_leaves_lambda_alone() -> None:
    net, optimizer, *_ = trained(anchor_every=1)
    optimizer._passes.tap.last.args[0][0] = math.nan
    before = snapshot(net, optimizer)
    optimizer.step()
    after = snapshot(net, optimizer)
    count = len(list(net.parameters()))
    assert all(torch.isfinite(t).all() for t in after)
    assert not torch.equal(before[0], after[0])  # θ moves on, by the Q there is
    told = optimizer.diagnostics()
    assert told["skipped_aux_steps"] == 1 and told["skipped_steps"] == 0
    aux = [t for b in optimizer.blocks for t in b.structure.fishleg_aux.values()]
    assert count == 4 and all(torch.isfinite(t).all() for t in aux)


def test_lambda_that_is_not_finite_is_an_error_that_names_it_and_parameters_stay() -> None:
    net, optimizer, *_ = trained()
    net[2].fishleg_aux["L"][0, 0] = math.nan
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match=r"λ of '2', fishleg_aux\['L'\], is not finite"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(before, net.parameters(), strict=True))


def test_an_interrupted_step_leaves_a_usable_optimizer() -> None:
    net, optimizer, x, y = trained()
    forward, calls = type(net[1]).forward, []

    def interrupt(self: nn.Module, *args: Tensor) -> Tensor:
        calls.append(1)
        raise KeyboardInterrupt

    nn.Tanh.forward = interrupt
    try:
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    finally:
        nn.Tanh.forward = forward
    assert calls
    optimizer.zero_grad()
    LIKELIHOOD.nll(y, net(x)).backward()
    optimizer.step()
    assert optimizer._passes.tap.last is not None and not optimizer._passes.tap.paused
    assert all(torch.isfinite(p).all() for p in net.parameters())


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    batch=st.integers(1, 7),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    structure=st.sampled_from(sorted(STRUCTURES)),
    bias=st.booleans(),
    likelihood=st.sampled_from([GaussianLikelihood(), BernoulliLikelihood(), CategoricalLikelihood()]),
    momentum=st.sampled_from(["before", "after"]),
    normalize=st.sampled_from(["rms", "spectral", "trust", None]),
    max_factor_size=st.sampled_from([None, 1, 4]),
)
def test_any_small_network_takes_finite_steps(
    sizes, batch, dtype, structure, bias, likelihood, momentum, normalize, max_factor_size
) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, bias=bias) for a, b in pairwise(sizes)]
    net = nn.Sequential(*layers).to(dtype)
    optimizer = FishLeg(
        net, likelihood=likelihood, structure=structure, momentum=momentum, normalize=normalize, update_aux_every=1,
        max_factor_size=max_factor_size, lr=1e-3,
    )  # fmt: skip
    for _ in range(3):
        x = torch.randn(batch, sizes[0]).to(dtype)
        outputs = net(x)
        with torch.no_grad():
            y = likelihood.draw(outputs)
        optimizer.zero_grad()
        likelihood.nll(y, outputs).backward()
        optimizer.step()
    assert all(torch.isfinite(p).all() and p.dtype == dtype for p in net.parameters())
    told = optimizer.diagnostics()
    assert told["skipped_steps"] == 0


def test_a_likelihood_with_parameters_needs_their_fisher_product() -> None:
    class Tempered(GaussianLikelihood):
        own_fisher_product = Likelihood.own_fisher_product

    with pytest.raises(ValueError, match="likelihood should implement own_fisher_product"):
        FishLeg(nn.Linear(3, 2), likelihood=Tempered(learn=True))
    FishLeg(nn.Linear(3, 2), likelihood=Tempered(learn=True), fisher="hessian")


class Scored(nn.Module):
    """A model that returns its loss, or a score without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).square().mean()


KINDS = {
    "gaussian": GaussianLikelihood(),
    "learned sigma": GaussianLikelihood(learn=True),
    "bernoulli": BernoulliLikelihood(),
    "categorical": CategoricalLikelihood(),
    "classes last": CategoricalLikelihood(class_dim=-1),
}


@pytest.mark.parametrize("init", ["kfac", "sgd"])
@pytest.mark.parametrize("kind", KINDS)
def test_models_that_return_their_loss_are_told(kind: str, init: str) -> None:
    net = Scored()
    told = pytest.raises(ValueError, match=r"outputs should have a dimension for the batch .*draw= and nll=")
    with told:
        KINDS[kind].nll(torch.tensor(1), torch.tensor(0.5))
    optimizer = FishLeg(net, likelihood=KINDS[kind], init=init, anchor_every=0)
    net(torch.randn(8, 3)).backward()
    with told:
        optimizer.step()


@pytest.mark.parametrize("batch", [{"input": torch.randn(8, 3), "labels": torch.zeros(8)}, {"x": torch.randn(8, 3)}])
@pytest.mark.parametrize("options", [{}, {"init": "sgd", "anchor_every": 0}, {"fisher": "hessian"}], ids=str)
def test_a_loaders_mapping_that_the_model_does_not_take_is_told(batch: dict, options: dict) -> None:
    net = nn.Linear(3, 2)
    optimizer = FishLeg(net, likelihood=LIKELIHOOD, aux_loader=[batch], **options)
    LIKELIHOOD.nll(torch.zeros(8, dtype=torch.long), net(torch.randn(8, 3))).backward()
    with pytest.raises(
        TypeError, match=r"(?s)unexpected keyword argument.*aux_loader that is a mapping .*without labels"
    ):
        optimizer.step()
