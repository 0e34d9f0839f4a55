"""FishLeg's arguments: checked, and frozen. Each message names the argument, its value and what it should be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property, partial
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from .backends.protocol import LambdaOptions, ThetaOptions
from .fisher.learning import CurvatureOptions
from .fisher.products import FISHER
from .likelihoods import Likelihood
from .model.assemble import StructureChoice, check_choice, refuse_uninitialized
from .model.block import is_sharded
from .precision import PRECISIONS

NORMALIZATIONS = ("auto", "rms", "spectral")  # of each block by itself
AUX_LR = {"adam": 5e-4, "natural": 0.1}  # the defaults
DAMPING = {"relative": 10.0, "absolute": 0.1}  # the defaults
_CHOICES = {
    "fisher": tuple(FISHER),
    "aux_update": ("adam", "natural"),
    "u_sampling": ("gradient", "momentum", "gaussian"),
    "init": ("kfac", "sgd"),
    "momentum": ("before", "after"),
    "normalize": ("auto", "rms", "spectral", "trust", None),
    "damping_scale": ("relative", "absolute"),
    "anchor_from": ("drawn", "training"),
    "precision": (*PRECISIONS, None),
}


def told(setting: Any) -> Any:
    """A setting as plain data that is the same in every process which has the same one."""
    if isinstance(setting, Mapping):
        return tuple((key, told(value)) for key, value in setting.items())
    if isinstance(setting, (list, tuple)):
        return tuple(map(told, setting))
    if setting is None or isinstance(setting, (str, int, float)):
        return setting
    if isinstance(setting, partial):
        return told(setting.func), told(setting.args), told(setting.keywords)
    return getattr(setting, "__qualname__", type(setting).__qualname__)



@dataclass(frozen=True)
class Settings:
    """What is one for the whole model, with the names and meanings of ``FishLeg``'s arguments.

    TypeError or ValueError where a value is wrong.
    """

    # the step
    momentum: str
    nesterov: bool
    normalize: str | Mapping[str, str] | None
    kappa: float
    step_limit: float | None
    capturable: bool
    on_device: bool  # whether steps are decided on the device, as capturable asks and where waiting for one costs time
    # λ and its learning
    structure: StructureChoice | Mapping[str, StructureChoice]
    products: bool  # whether every Q is a single Kronecker product or a diagonal
    max_factor_size: int | str | None
    damping: float
    damping_scale: str
    fisher: str
    curvature_batch: int | str | None
    aux_update: str
    update_aux_every: int
    aux_lr: float
    aux_betas: tuple[float, float]
    aux_eps: float
    u_sampling: str
    precondition_aux: bool
    learn_scale: bool
    # its start, and anchoring
    init: str
    scale: float
    anchor_every: int
    anchor_decay: float
    anchor_from: str
    # the rest
    precision: str | None
    writer: Any
    seed: int

    def __post_init__(self) -> None:
        for name in ("structure", "normalize"):
            choice = getattr(self, name)
            for pattern in choice if isinstance(choice, Mapping) else ():
                if not isinstance(pattern, str):
                    raise TypeError(f"{name} should have name patterns, strings, for its keys but has: {pattern!r}")
        if isinstance(self.normalize, Mapping):
            for choice in self.normalize.values():
                if choice not in NORMALIZATIONS:
                    raise ValueError(f"normalize should map patterns to one of {NORMALIZATIONS} but has: {choice!r}")
        for name, choices in _CHOICES.items():
            if name == "normalize" and isinstance(self.normalize, Mapping):
                continue
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} should be one of {choices} but is: {getattr(self, name)!r}")
        for name in ("aux_lr", "damping", "scale", "kappa", "aux_eps"):
            _check_number(name, getattr(self, name), strict=True)
        if not isinstance(self.aux_betas, (tuple, list)) or len(self.aux_betas) != 2:
            raise ValueError(f"aux_betas should be a pair of numbers but is: {self.aux_betas!r}")
        for i, beta in enumerate(self.aux_betas):
            _check_number(f"aux_betas[{i}]", beta, below=1)
        if self.step_limit is not None:
            _check_number("step_limit", self.step_limit, strict=True)
        _check_number("anchor_decay", self.anchor_decay, below=1)
        check_count("update_aux_every", self.update_aux_every, least=-1_000_000)
        check_count("anchor_every", self.anchor_every)
        check_count("seed", self.seed)
        if self.max_factor_size not in (None, "auto"):
            check_count("max_factor_size", self.max_factor_size, least=1)
        if self.curvature_batch not in (None, "auto"):
            check_count("curvature_batch", self.curvature_batch, least=1)
        for name in ("precondition_aux", "learn_scale", "nesterov"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} should be a bool but is: {getattr(self, name)!r}")
        check_choice(self.structure)
        if self.momentum == "after" and self.u_sampling == "momentum":
            raise ValueError(
                "u_sampling='momentum' needs an average of gradients, but momentum='after' averages Q g; use "
                "momentum='before'"
            )
        if self.damping_scale == "relative":
            if not self.by_block:
                raise ValueError(
                    f"normalize should be one of {NORMALIZATIONS} with damping_scale='relative', where Q has no scale, "
                    f"but is: {self.normalize!r}"
                )
            if self.init != "kfac" and not self.anchor_every and self.aux_update != "natural":
                raise ValueError(
                    "damping_scale='relative' is in units of the Fisher matrix's factors, and needs them estimated: "
                    "init='kfac', anchor_every > 0 or aux_update='natural'"
                )
        if self.aux_update == "natural":
            self._check_natural()
        if self.anchor_from == "training" and self.damping_scale != "relative":
            raise ValueError(
                "anchor_from='training' goes with damping_scale='relative', since the scale of the loss trained on is "
                f"not known, but damping_scale is: {self.damping_scale!r}"
            )
        if self.writer is not None and not callable(getattr(self.writer, "add_scalar", None)):
            raise TypeError(
                f"writer should have add_scalar, as a tensorboard SummaryWriter does, but is: {self.writer!r}"
            )

    def _check_natural(self) -> None:
        if self.anchor_every:
            raise ValueError(
                "anchor_every should be 0 with aux_update='natural', which learns from the same factors that anchoring "
                f"would estimate Q from, but is: {self.anchor_every}"
            )
        if self.update_aux_every < 1:
            raise ValueError(
                f"update_aux_every should be at least 1 with aux_update='natural' but is: {self.update_aux_every}"
            )
        if self.aux_lr > 1:
            raise ValueError(
                f"aux_lr should be at most 1 with aux_update='natural', of which it is the rate, but is: {self.aux_lr}"
            )
        if not self.products:
            raise ValueError(
                "structure should be 'kron' or 'diagonal', of all layers, with aux_update='natural', but is: "
                f"{self.structure!r} or a layer's own; use aux_update='adam'"
            )

    @property
    def by_block(self) -> bool:
        """Whether each block is scaled by itself, so that its parameter group may say how."""
        return isinstance(self.normalize, Mapping) or self.normalize in NORMALIZATIONS

    @property
    def learned_by_adam(self) -> bool:
        """Whether updates of λ keep Adam's moments."""
        return self.aux_update == "adam" and self.update_aux_every != 0

    @cached_property
    def theta(self) -> ThetaOptions:
        """Those of the θ step."""
        return ThetaOptions(
            momentum=self.momentum, nesterov=self.nesterov, kappa=self.kappa, capturable=self.on_device,
            normalize=None if self.normalize is None else "trust" if self.normalize == "trust" else "spectral",
        )  # fmt: skip

    @cached_property
    def curvature(self) -> CurvatureOptions:
        """Those of λ."""
        relative = self.damping_scale == "relative"
        update = LambdaOptions(
            damping=self.damping, lr=self.aux_lr, betas=self.aux_betas,
            eps=self.aux_eps,
            precondition=self.precondition_aux, learn_scale=self.learn_scale, capturable=self.on_device,
        )  # fmt: skip
        return CurvatureOptions(
            update=update, update_aux_every=self.update_aux_every, fisher=self.fisher, u_sampling=self.u_sampling,
            init=self.init, anchor_every=self.anchor_every, anchor_decay=self.anchor_decay,
            curvature_batch=self.curvature_batch, relative_damping=relative,
            anchor_from=self.anchor_from, aux_update=self.aux_update,
        )  # fmt: skip


def default_damping_scale(
    normalize: str | Mapping[str, str] | None, init: str, anchor_every: int, aux_update: str
) -> str:
    """ "relative" where Q's own scale does not matter and the Fisher matrix's is estimated."""
    estimated = init == "kfac" or bool(anchor_every) or aux_update == "natural"
    return "relative" if estimated and normalize not in ("trust", None) else "absolute"


def default_update_aux_every(products: bool, normalize: str | Mapping[str, str] | None, anchor_every: int) -> int:
    """0 where anchoring gives all of Q that matters: its only Kronecker product or diagonal, up to a multiple."""
    return 0 if products and anchor_every and normalize not in ("trust", None) else 10


def default_aux_update(products: bool, anchor_every: int, update_aux_every: int | None) -> str:
    """ "natural" where λ is learned from its start on, and what it learns is a Kronecker product or diagonal."""
    once_at_most = update_aux_every is None or update_aux_every > 0
    return "natural" if products and not anchor_every and once_at_most else "adam"


def only_products(structure: StructureChoice | Mapping[str, StructureChoice], own: Iterable[Any] = ()) -> bool:
    """Whether all that is chosen, and what layers choose for themselves, is a single Kronecker product or diagonal."""
    choices = structure.values() if isinstance(structure, Mapping) else [structure]
    return all(choice in ("kron", "diagonal") for choice in (*choices, *own))


def _check_number(name: str, value: object, least: float = 0.0, below: float = math.inf, strict: bool = False) -> None:
    """TypeError or ValueError unless least ≤ value < below (least < value where ``strict``)."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} should be a number or a scalar tensor but has shape: {tuple(value.shape)}")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} should be a number but is: {value!r}")
    value = float(value)
    if not math.isfinite(value) or value < least or value >= below or (strict and value == least):
        limits = f"{'greater than' if strict else 'at least'} {least:g}" + (
            "" if below == math.inf else f" and below {below:g}"
        )
        raise ValueError(f"{name} should be {limits} but is: {value!r}")


def check_count(name: str, value: object, least: int = 0) -> None:
    """TypeError or ValueError unless value is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} should be an integer but is: {value!r}")
    if value < least:
        raise ValueError(f"{name} should be at least {least} but is: {value}")


def check_sources(model: Any, draw: Any, nll: Any, likelihood: Any, aux_loader: Any, fisher: str) -> None:
    """What the loss and the curvature batches come from."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model should be an nn.Module but is: {type(model).__name__}; pass parameters as params=")
    for name, function in (("draw", draw), ("nll", nll)):
        if isinstance(function, Likelihood):
            raise TypeError(f"{name} should be a function but is: {type(function).__name__}; pass it as likelihood=")
        if function is not None and not callable(function):
            raise TypeError(f"{name} should be callable but is: {function!r}")
    if likelihood is not None and not isinstance(likelihood, Likelihood):
        given = likelihood.__name__ if isinstance(likelihood, type) else type(likelihood).__name__
        raise TypeError(
            f"likelihood should be a fishleg_fast.Likelihood but is: {given}; CategoricalLikelihood() for classes, "
            "GaussianLikelihood() for squared error, BernoulliLikelihood() for binary cross entropy"
        )
    if (draw is None) != (nll is None):
        raise ValueError(f"draw and nll go together, but {'draw' if draw is None else 'nll'} is missing")
    if likelihood is None and nll is None:
        raise ValueError("FishLeg needs likelihood=, or both draw= and nll=, to know the Fisher matrix; none was given")
    if fisher == "ggn" and likelihood is None:
        raise ValueError("fisher='ggn' needs likelihood=; draw and nll alone do with fisher='hessian'")
    if fisher == "ggn" and likelihood is not None and any(p.requires_grad for p in likelihood.parameters()):
        if type(likelihood).own_fisher_product is Likelihood.own_fisher_product:
            raise ValueError(
                f"likelihood should implement own_fisher_product(outputs, vs), since {type(likelihood).__name__} has "
                "parameters of its own, but does not; or use fisher='hessian'"
            )
    if aux_loader is not None:
        if not isinstance(aux_loader, Iterable):
            raise TypeError(f"aux_loader should be iterable, like a DataLoader, but is: {type(aux_loader).__name__}")
        try:
            size = len(aux_loader) if isinstance(aux_loader, Sized) else None
        except TypeError:  # a DataLoader over an IterableDataset
            size = None
        if size == 0:
            raise ValueError("aux_loader should not be empty but has length: 0")


def check_group(options: dict[str, Any]) -> None:
    """A parameter group's options."""
    _check_number("lr", options["lr"])
    _check_number("weight_decay", options["weight_decay"])
    _check_number("beta", options["beta"], below=1)
    if options.get("normalize") not in (*NORMALIZATIONS, None):
        raise ValueError(f"normalize of a group should be one of {NORMALIZATIONS} but is: {options['normalize']!r}")
    if not isinstance(options["maximize"], bool):
        raise TypeError(f"maximize should be a bool but is: {options['maximize']!r}")


def chosen_parameters(roots: Sequence[tuple[str, nn.Module]], params: Iterable[Any] | None) -> list[Any]:
    """What the optimizer trains: ``params``, or everything trainable under the roots."""
    for prefix, root in roots:
        refuse_uninitialized(root, prefix)
    if isinstance(params, Tensor):
        raise TypeError("params should be an iterable of tensors or of dicts but is: a tensor")
    chosen = [p for _, root in roots for p in root.parameters() if p.requires_grad] if params is None else list(params)
    if not chosen:
        where = "model should have a trainable parameter" if params is None else "params should hold a parameter"
        raise ValueError(
            f"{where} but has none" + (" (does everything have requires_grad=False?)" if params is None else "")
        )
    return chosen


def check_membership(
    roots: Sequence[tuple[str, nn.Module]], params: Sequence[Tensor], may_be_sharded: bool = False
) -> None:
    """Every parameter is the model's or the likelihood's, plain, real floating point, and not of a scripted module."""
    names = {id(p): prefix + name for prefix, root in roots for name, p in root.named_parameters()}
    scripted = {
        id(p): type(module).__name__
        for _, root in roots
        for module in root.modules()
        if isinstance(module, torch.jit.ScriptModule)
        for p in module.parameters(recurse=False)
    }
    for p in params:
        if id(p) not in names:
            raise ValueError(f"params should be parameters of the model, but one of shape {tuple(p.shape)} is not")
        if p.is_meta and is_sharded(p):  # which is given memory anew: the optimizer would keep what is gone
            raise ValueError(
                f"parameter {names[id(p)]!r} should have memory but is on the meta device: make the optimizer after "
                "model.to_empty(device=...) and after its weights are there"
            )
        if id(p) in scripted:
            raise TypeError(
                f"parameter {names[id(p)]!r} should be of a module that Python runs, but is of a scripted one "
                f"({scripted[id(p)]}), whose layers are not to be seen: make the optimizer of the module that it was "
                "scripted or traced from, or use torch.compile on that"
            )
        # Of other subclasses memory is not what their shape says.
        if type(p).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not (may_be_sharded and is_sharded(p)):
            raise TypeError(
                f"parameter {names[id(p)]!r} should be a plain torch.nn.Parameter but is a {type(p).__name__}, a "
                "tensor subclass: make the optimizer of the module as it is before quantization, a tensor parallel "
                "plan or what else wraps its parameters; of those that ranks share fully_shard's alone are supported"
            )
        if not p.is_floating_point():
            raise TypeError(f"parameter {names[id(p)]!r} should be real floating point but has dtype: {p.dtype}")
        if p.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise TypeError(
                f"parameter {names[id(p)]!r} should be float16, bfloat16, float32 or float64 but has dtype: {p.dtype}"
            )
