"""torch's default device is the user's: whatever it is, the optimizer works where the parameters are."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fishleg_fast import CategoricalLikelihood, FishLeg, GaussianLikelihood

ROOT = Path(__file__).resolve().parents[1]
FACTORIES = set(
    "arange as_tensor empty empty_strided eye full Generator linspace logspace ones rand randint randn randperm "
    "scalar_tensor tensor tril_indices triu_indices zeros".split()
)


def unplaced(source: str) -> list[int]:
    """The lines of calls of torch's factories that do not name a device, but of new parameters of modules."""
    tree = ast.parse(source)
    parameters = {
        id(argument)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("nn.Parameter")
        for argument in node.args
    }
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or id(node) in parameters:
            continue
        module, _, name = ast.unparse(node.func).rpartition(".")
        named = {keyword.arg for keyword in node.keywords}  # None: **options
        placed = bool(named & {"device", None}) or (name == "Generator" and bool(node.args))
        if module == "torch" and name in FACTORIES and not placed:
            lines.append(node.lineno)
    return lines


def test_everything_that_is_allocated_names_its_device() -> None:
    files = [*(ROOT / "fishleg_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    assert len(files) > 60
    assert not {str(f.relative_to(ROOT)): lines for f in files if (lines := unplaced(f.read_text()))}


def test_what_names_no_device_is_found() -> None:
    source = "a = torch.zeros(3)\nb = torch.zeros(3, device=d)\nc = torch.Generator()\nd = torch.Generator('cpu')\n"
    source += "e = torch.zeros(3, **options)\nf = nn.Parameter(torch.ones(2))\ng = [torch.tensor(\n1)]\n"
    assert unplaced(source) == [1, 3, 7]


@contextmanager
def default_device(name: str | None) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


class Net(nn.Module):
    """Layers of many kinds; dropout, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.conv = nn.Conv1d(6, 4, 3, padding=1)
        self.batch_norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.2)
        self.head = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(torch.tanh(self.drop(self.batch_norm(self.conv(x.mT))).mean(-1))) * self.scale


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 3))


CASES: dict[str, dict] = {
    **{f"fisher={name}": {"fisher": name} for name in ("ggn", "hessian", "antithetic", "rank1")},
    **{f"structure={name}": {"structure": name} for name in ("sumkron", "diagkron", "diagonal")},
    **{f"normalize={name}": {"normalize": name} for name in ("spectral", "rms", "trust", None)},
    **{f"u_sampling={name}": {"u_sampling": name} for name in ("momentum", "gaussian")},
    "capturable": {"capturable": True},
    "momentum=after": {"momentum": "after"},
    "precondition_aux": {"precondition_aux": True, "learn_scale": False},
    "init=sgd": {"init": "sgd", "anchor_every": 0, "aux_update": "adam"},
    "anchor_from=training": {"anchor_from": "training"},
    "aux_loader": {"aux_loader": True},
    "max_factor_size": {"max_factor_size": 4},
    "dense gradients": {"thin_gradients": False},
    "tensor lr": {"lr": torch.tensor(0.01)},
    "precision": {"precision": "medium"},
    "double": {"dtype": torch.float64},
    "layers": {"build": Net},
    "layers, by hessian": {"build": Net, "fisher": "hessian"},
    "layers, from training": {"build": Net, "anchor_from": "training"},
    "learned noise": {"likelihood": lambda: GaussianLikelihood(learn=True)},
    "fixed noise": {"likelihood": GaussianLikelihood},
}


def run(device: str | None, settings: dict) -> list[Tensor]:
    """Everything after a few steps, pretraining and a checkpoint, under a default device."""
    options = {"build": mlp, "likelihood": CategoricalLikelihood, "dtype": torch.float32, **settings}
    build, make_likelihood, dtype = (options.pop(name) for name in ("build", "likelihood", "dtype"))
    torch.manual_seed(0)
    nets = [build().to(dtype) for _ in range(2)]
    likelihood = make_likelihood()
    xs = [torch.randint(11, (9, 5)) if build is Net else torch.randn(9, 6, dtype=dtype) for _ in range(5)]
    regression = isinstance(likelihood, GaussianLikelihood)
    ys = [torch.randn(9, 3, dtype=dtype) if regression else torch.randint(3, (9,)) for _ in range(5)]
    if options.get("aux_loader"):
        options["aux_loader"] = list(zip(xs, ys, strict=True))
    found: list[Tensor] = []
    with default_device(device):
        optimizers = [
            FishLeg(net, likelihood=likelihood, **{"update_aux_every": 1, "anchor_every": 3, **options}) for net in nets
        ]
        for net, optimizer in zip(nets, optimizers, strict=True):
            for x, y in zip(xs, ys, strict=True):
                optimizer.zero_grad()
                likelihood.nll(y, net(x)).backward()
                optimizer.step()
            optimizer.pretrain_aux(1)
            if len(found):  # another, resumed from the first one's
                optimizer.load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
            told = optimizer.diagnostics()
            assert told["steps"] == 5 and not told["skipped_steps"] and not told["skipped_aux_steps"]
            found += [p.detach() for p in net.parameters()]
            found += [t for b in optimizer.blocks for t in (b.momentum, *b.structure.fishleg_aux.values())]
    return found


@pytest.mark.filterwarnings("ignore:.*differentiates twice")
@pytest.mark.parametrize("case", CASES)
def test_training_under_another_default_device_is_the_same(case: str) -> None:
    want, got = run(None, CASES[case]), run("meta", CASES[case])
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_each_backend(backend: str) -> None:
    settings = {"build": Net, "backend": backend}
    assert all(torch.equal(a, b) for a, b in zip(run(None, settings), run("meta", settings), strict=True))
