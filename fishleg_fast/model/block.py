"""A block: the parameters of one layer seen as one matrix θ (m, n), with its λ and the state of its moving averages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..algebra.matrix import Matrix
from ..algebra.structures.base import LambdaVersion, Structure


def is_sharded(t: Tensor) -> bool:
    """Whether it is a DTensor, of which ranks hold pieces."""
    if type(t).__torch_dispatch__ is Tensor.__torch_dispatch__ or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # half a second, which only those pay that have one

    return isinstance(t, DTensor)


@dataclass
class Part:
    """A parameter, or some of its rows, that is (part of) a block."""

    param: nn.Parameter
    rows: slice | None = None
    name: str = ""  # of the parameter in its module

    def held_as(self, module: nn.Module, name: str) -> bool:
        """Whether it is the module's parameter of that name; one that ranks share may be there as a whole one."""
        return self.param is module._parameters.get(name) or (self.name == name and is_sharded(self.param))

    def of(self, tensor: Tensor) -> Tensor:
        """The part's view of a tensor that has the parameter's shape."""
        return tensor if self.rows is None else tensor[self.rows]

    @property
    def shape(self) -> torch.Size:
        """The part's."""
        whole = self.param.shape
        return whole if self.rows is None else torch.Size((len(range(*self.rows.indices(whole[0]))), *whole[1:]))


def _empty() -> Tensor:
    return torch.zeros((), dtype=torch.float32, device="cpu")


def advance(counters: Sequence[Tensor], ok: Tensor | None = None) -> None:
    """Add one to each step counter; with ``ok``, a boolean on any device, where that is true: it crosses over to
    another once for all of the counters there.
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for counter in counters:
        by_device.setdefault(counter.device, []).append(counter)
    for device, mine in by_device.items():
        torch._foreach_add_(mine, 1.0 if ok is None else [ok.to(device, torch.float32)] * len(mine))


def weights_of(blocks: Sequence[Block]) -> list[float]:
    """The total weight of each block's moving average of moments."""
    return torch.stack([b.moments_weight for b in blocks]).tolist() if blocks else []


def moments_divisor(block: Block, unit: Tensor, weight: float) -> Tensor:
    """That of blocks like this one, with their units and their averages' weight."""
    return unit ** (1 / len(block.moments)) * weight


class BackendState:
    """What a backend keeps on a block: what it has prepared, workspaces. Made without arguments.

    It is of that block's memory: a copied block starts without.
    """

    def __deepcopy__(self, memo: dict) -> BackendState:
        return type(self)()


State = TypeVar("State", bound=BackendState)


@dataclass(eq=False)
class Block:
    """What every op takes: parameters, gradients, λ, moving averages and hyperparameters of one layer.

    ``axis`` tells how the parts make the matrix: 1, side by side as columns, each seen as (m, numel/m), the weight and
    its bias; 0, one below the other as a single column. No part is empty.
    """

    name: str
    parts: list[Part]
    axis: int
    structure: Structure
    key: str = ""  # tells apart the blocks that are rows of one parameter
    layer: nn.Module | None = None  # whose inputs and outputs tell the Kronecker factors
    momentum: Tensor = field(default_factory=_empty)  # moving average of g, or of Q g: (m, n)
    step: Tensor = field(default_factory=_empty)  # scalar float32: how often the block was stepped
    exp_avg: dict[str, Tensor] = field(default_factory=dict)  # Adam's moments of λ; none where λ is not learned
    exp_avg_sq: dict[str, Tensor] = field(default_factory=dict)
    aux_step: Tensor = field(default_factory=_empty)  # scalar float32: Adam's steps
    moments: dict[str, Tensor] = field(default_factory=dict)  # moving average of the Kronecker factors of the Fisher
    moments_weight: Tensor = field(default_factory=_empty)  # scalar float32: its total weight, 0 before the first
    unit: Tensor = field(default_factory=_empty)  # scalar of λ's dtype: the eigenvalue of F that is 1 in what λ inverts
    grads: list[Tensor | None] = field(default_factory=list)  # this step's, one a part; negated where it maximizes
    product: Tensor | None = None  # Q m, of the λ that product_version tells; kept for low-rank gradients only
    product_version: LambdaVersion | None = None  # None: m has moved on
    scratch_memory: Tensor | None = None  # (m, n)
    backend_states: dict[type, BackendState] = field(default_factory=dict)  # what each backend keeps on it, by class
    repeated: bool | None = None  # whether a sample uses the weights at several positions, tokens or pixels; if known
    layer_agrees: bool | None = None  # whether what the layer shows is the gradient; None: not compared yet
    spectral: bool = True  # whether the update gives way to its polar factor under normalize="spectral"
    groups: list[dict] = field(default_factory=list)  # the parameter group of each part, none if one was removed
    sharded: list[nn.Parameter] | None = None  # the model's parameters where the parts are stand-ins for them

    @cached_property
    def params(self) -> list[nn.Parameter]:
        """The parameter of each part."""
        return [part.param for part in self.parts]

    @property
    def model_params(self) -> list[nn.Parameter]:
        """The model's parameter of each part: itself, or where ranks hold shards of it that DTensor."""
        return self.params if self.sharded is None else self.sharded

    @property
    def dtype(self) -> torch.dtype:
        """Of λ and of every moving average: float32 unless the parameters are float64."""
        return torch.float64 if self.parts[0].param.dtype == torch.float64 else torch.float32

    @property
    def beta(self) -> float:
        """Momentum: that of the first part's group."""
        return self.groups[0]["beta"]

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(m, n)"""
        shapes = [part.shape for part in self.parts]
        if self.axis == 0:
            return sum(s.numel() for s in shapes), 1
        m = shapes[0][0]
        return m, sum(s.numel() for s in shapes) // m

    @property
    def flattened(self) -> bool:
        """Whether normalize="spectral" takes the polar factor of its update: a vector has but one singular value."""
        return self.spectral and min(self.shape) > 1

    def matrix(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """One tensor a part, None for zeros -> (m, n) in λ's dtype."""
        pieces = []
        for part, t in zip(self.parts, tensors, strict=True):
            t = torch.zeros(part.shape, dtype=part.param.dtype, device=part.param.device) if t is None else t
            pieces.append(self._piece(t if t.layout == torch.strided else t.to_dense()))
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=self.axis)
        return whole.to(self.dtype)

    def _piece(self, tensor: Tensor) -> Tensor:
        rows = tensor.shape[0] if self.axis else tensor.numel()
        return tensor.reshape(rows, tensor.numel() // rows)

    def split(self, matrix: Tensor) -> list[Tensor]:
        """(m, n) -> one tensor a part, in the part's shape and λ's dtype; views where that is possible."""
        sizes, shapes = self.layout
        return [piece.reshape(s) for s, piece in zip(shapes, matrix.split(sizes, dim=self.axis), strict=True)]

    @cached_property
    def layout(self) -> tuple[list[int], list[torch.Size]]:
        """How many rows or columns each part takes, and each part's shape."""
        shapes = [part.shape for part in self.parts]
        return [s.numel() // (self.shape[0] if self.axis else 1) for s in shapes], shapes

    def allocate(self, on_device: bool, learned: bool = True) -> None:
        """Zeroed state on the parameters' device; the counters stay on the CPU unless ``on_device``. Adam's moments of
        λ only where it is ``learned``.
        """
        device = self.parts[0].param.device
        counters = device if on_device else torch.device("cpu")
        self.step, self.aux_step = (torch.zeros((), dtype=torch.float32, device=counters) for _ in range(2))
        self.momentum = torch.zeros(self.shape, dtype=self.dtype, device=device)
        if learned:
            self.allocate_adam()
        self.moments = self.structure.new_moments()
        self.moments_weight = _empty()
        self.unit = torch.ones((), dtype=self.dtype, device=device)

    def allocate_adam(self) -> None:
        """Zeroed moments of λ for Adam, where there are none yet: in the dicts that a checkpoint's state shows."""
        for moments in (self.exp_avg, self.exp_avg_sq):
            for name, t in self.structure.fishleg_aux.items():
                if name not in moments:
                    moments[name] = torch.zeros_like(t)

    def buffers(self) -> tuple[Tensor, Tensor]:
        """``product`` and scratch memory, of the momentum's shape, made at the first call."""
        if self.product is None:
            self.product = torch.empty_like(self.momentum)
        return self.product, self.scratch()

    def scratch(self) -> Tensor:
        """Memory of the momentum's shape for what is not needed after an op, made at the first call."""
        if self.scratch_memory is None:
            self.scratch_memory = torch.empty_like(self.momentum)
        return self.scratch_memory

    def kept(self, kind: type[State]) -> State:
        """A backend's state, made at the first call; it lives as long as the block, whatever other backends keep."""
        try:
            return self.backend_states[kind]  # type: ignore[return-value]
        except KeyError:
            return self.backend_states.setdefault(kind, kind())  # type: ignore[return-value]

    def check_placement(self) -> None:
        """RuntimeError where the parameters have left λ's device or dtype."""
        param = self.parts[0].param
        if self.momentum.device != param.device or self.momentum.dtype != self.dtype:
            raise RuntimeError(
                f"λ of {self.name!r} is {self.momentum.dtype} on {self.momentum.device} but its parameter is "
                f"{param.dtype} on "
                f"{param.device}: move or convert the model before making the optimizer"
            )

    @property
    def estimated(self) -> bool:
        """Whether there is a moving average of the Fisher matrix's factors."""
        return bool(self.moments) and bool(self.moments_weight)

    def mean_eigenvalue(self) -> Tensor:
        """Of the block's Fisher matrix, by its moving average: a scalar."""
        return self.structure.mean_eigenvalue(self.moments, float(self.moments_weight))

    @property
    def moments_divisor(self) -> Tensor:
        """What to divide each moment by for those of F/unit: a scalar of λ's dtype."""
        return moments_divisor(self, self.unit, float(self.moments_weight))

    def fisher_product(self, v: Matrix) -> Matrix:
        """F v/unit by the moving average: of low rank where v is."""
        return self.structure.fisher_product(self.moments, self.moments_divisor, v)

    @property
    def product_known(self) -> bool:
        """Whether ``product`` is Q m."""
        return self.product_version is not None and self.product_version == self.structure.version

    def state(self) -> dict:
        """What a checkpoint holds of the block: live tensors, by name, Q m among them since its rounding goes on."""
        known = {"product": self.product} if self.product_known else {}
        return {
            **known,
            "step": self.step,
            "momentum": self.momentum,
            "fishleg_aux": self.structure.fishleg_aux,
            "aux_step": self.aux_step,
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "moments": self.moments,
            "moments_weight": self.moments_weight,
            "unit": self.unit,
        }
