"""Modules that carry their own inverse Fisher matrix, and the base class for a user's own.

Plain torch layers need no conversion: the optimizer treats ``nn.Linear`` and ``FishLinear`` alike. The Fish classes add
``Qv`` and a structure of their own choice; a custom layer subclasses :class:`FishModule`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.maths import Aux, Maths, no_cache
from ..algebra.structures.base import Structure
from .block import Block


class AuxView(Mapping[str, Tensor]):
    """A layer's λ, as ``module.fishleg_aux``.

    It belongs to the optimizer: copying or pickling the module leaves it behind.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        self._tensors = dict(tensors or {})

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"AuxView({{{', '.join(f'{k}: {tuple(t.shape)}' for k, t in self.items())}}})"

    def __deepcopy__(self, memo: dict) -> AuxView:
        return AuxView()

    def __reduce__(self) -> tuple:
        return AuxView, ()


class FishModule(nn.Module, ABC):
    """A custom layer with its own inverse Fisher approximation.

    Set ``self.fishleg_aux``, an ``nn.ParameterDict`` or a dict of tensors, in the constructor: λ, which the optimizer
    trains by autograd through ``Qv``. It is kept out of ``parameters()`` and ``state_dict()``, since it belongs to the
    optimizer.
    """

    fishleg_aux: Any

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "fishleg_aux":  # past nn.Module's registration
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @abstractmethod
    def Qv(self, v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Q(λ) v: a tensor for each of the module's own parameters, ordered as ``parameters(recurse=False)``.

        Q should be symmetric and positive definite, and differentiable with respect to ``fishleg_aux``.
        """


class _FishLayer(FishModule):
    """A torch layer that knows its blocks. ``structure`` (name or callable, see FishLeg) overrides the optimizer's."""

    def __init__(self, *args: Any, structure: str | Callable[..., Structure] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.structure = structure
        object.__setattr__(self, "fishleg_aux", AuxView())

    def Qv(self, v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Q(λ) v, one tensor a parameter, in the order and shapes of ``parameters(recurse=False)``.

        λ is the optimizer's; on a layer that no optimizer has taken up, Q is the identity. ValueError on a wrong count
        or shape.
        """
        named = list(self.named_parameters(recurse=False))
        if len(v) != len(named) or any(x.shape != p.shape for x, (_, p) in zip(v, named, strict=True)):
            raise ValueError(
                f"v should hold one tensor for each of {[f'{n} {tuple(p.shape)}' for n, p in named]} "
                f"but has shapes: {[tuple(x.shape) for x in v]}"
            )
        out = {id(p): x.clone() for x, (_, p) in zip(v, named, strict=True)}
        given = {id(p): x for x, (_, p) in zip(v, named, strict=True)}
        blocks: list[Block] = self.__dict__.get("_fishleg_blocks", [])
        for block in blocks:
            nat = block.structure.Qv(block.matrix([part.of(given[id(part.param)]) for part in block.parts]))
            for part, piece in zip(block.parts, block.split(nat), strict=True):
                part.of(out[id(part.param)]).copy_(piece)
        return tuple(out.values())

    def __getstate__(self) -> dict[str, Any]:  # what copy and pickle take: λ stays with the optimizer
        return {name: value for name, value in self.__dict__.items() if name != "_fishleg_blocks"}


class FishLinear(_FishLayer, nn.Linear):
    """``nn.Linear`` with Q over (out, in + 1)."""


class FishConv2d(_FishLayer, nn.Conv2d):
    """``nn.Conv2d`` with Q over (out, in/groups·kh·kw + 1). Groups, padding modes and bias=False as in torch."""


class FishEmbedding(_FishLayer, nn.Embedding):
    """``nn.Embedding`` with Q over (vocab, dim), its vocabulary side diagonal."""


class FishLayerNorm(_FishLayer, nn.LayerNorm):
    """``nn.LayerNorm`` with a diagonal Q."""


class FishRMSNorm(_FishLayer, nn.RMSNorm):
    """``nn.RMSNorm`` with a diagonal Q."""


class FishGroupNorm(_FishLayer, nn.GroupNorm):
    """``nn.GroupNorm`` with a diagonal Q."""


class FishBatchNorm1d(_FishLayer, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` with a diagonal Q."""


class FishBatchNorm2d(_FishLayer, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with a diagonal Q."""


class FishBatchNorm3d(_FishLayer, nn.BatchNorm3d):
    """``nn.BatchNorm3d`` with a diagonal Q."""


class FishMultiheadAttention(_FishLayer, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with one Q for each of the q, k and v projections; its ``out_proj`` is a layer of its
    own.
    """


def own_structures(root: nn.Module) -> list[Any]:
    """The structures that layers choose for themselves, beside the optimizer's: a FishModule with λ of its own is its
    class.
    """
    layers = [m for m in root.modules() if isinstance(m, FishModule)]
    chosen = [m.structure if isinstance(m, _FishLayer) else type(m) for m in layers]
    return [structure for structure in chosen if structure is not None]


class ModuleStructure(Structure):
    """The structure of a user's FishModule: Q is the module's ``Qv``, the λ-gradients come from autograd through it.

    The block is the module's trainable parameters, flattened one below the other, (N, 1). Frozen parameters meet zeros.
    """

    def __init__(self, module: FishModule, trainable: list[Tensor]) -> None:
        super().__init__((sum(p.numel() for p in trainable), 1))
        self._module, self._trainable = module, trainable
        aux = getattr(module, "fishleg_aux", None)
        if not isinstance(aux, (dict, nn.ParameterDict)) or not len(aux):
            raise TypeError(
                f"{type(module).__name__}.fishleg_aux should be an nn.ParameterDict or a dict of tensors but "
                f"is: {aux!r}; "
                "set it in the module's constructor"
            )
        for name, t in aux.items():
            if not isinstance(t, Tensor) or not t.is_floating_point() or not torch.isfinite(t).all():
                raise ValueError(
                    f"{type(module).__name__}.fishleg_aux[{name!r}] should be a finite floating-point tensor"
                )
            if isinstance(t, nn.Parameter):
                t.data = t.data.to(trainable[0].device)
            else:
                aux[name] = t.detach().to(trainable[0].device)
        self.fishleg_aux = {name: t.detach() for name, t in aux.items()}  # the module's own storage, without a graph
        self.maths = Maths(no_cache, self._qv, self._grads, self._diag)

    def _call(self, u: Tensor) -> Tensor:
        pieces = iter(u.split([p.numel() for p in self._trainable]))
        own = list(self._module.parameters(recurse=False))
        mine = {id(p) for p in self._trainable}
        v = tuple(next(pieces).reshape(p.shape) if id(p) in mine else u.new_zeros(p.shape) for p in own)
        out = self._module.Qv(v)
        if not isinstance(out, (tuple, list)) or [x.shape for x in out] != [p.shape for p in own]:
            got = [tuple(x.shape) for x in out] if isinstance(out, (tuple, list)) else type(out).__name__
            raise ValueError(
                f"{type(self._module).__name__}.Qv should return a tuple of shapes {[tuple(p.shape) for p in own]} "
                f"but gave: {got}"
            )
        return torch.cat([x.reshape(-1, 1) for x, p in zip(out, own, strict=True) if id(p) in mine])

    def _qv(self, aux: Aux, cache: Aux, u: Tensor) -> Tensor:
        with torch.no_grad():
            return self._call(u)

    def _grads(self, aux: Aux, cache: Aux, u: Tensor, w: Tensor) -> Aux:
        given = self._module.fishleg_aux
        leaves = {name: t.detach().requires_grad_() for name, t in self.fishleg_aux.items()}
        self._module.fishleg_aux = leaves
        try:
            with torch.enable_grad():
                s = (w * self._call(u)).sum()
                grads = torch.autograd.grad(s, list(leaves.values()), allow_unused=True, materialize_grads=True)
        finally:
            self._module.fishleg_aux = given
        return dict(zip(leaves, grads, strict=True))

    def _diag(self, aux: Aux, cache: Aux, m: int, n: int) -> Tensor:
        return self.dense().diagonal().reshape(m, n)
