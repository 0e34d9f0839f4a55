"""How each layer's parameters become matrices: one class a kind of layer, one row of ``LAYERS`` each.

A layer says which of its parameters form which block, and turns the inputs and output gradients that a forward and
backward pass showed into rows a (positions, n) and e (positions, m): the gradient is eᵀa, and with labels drawn from
the model their second moments are the Kronecker factors of the Fisher matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algebra.factors import cross
from ..algebra.maths import Aux
from ..algebra.structures.base import LayerStatistics
from .block import Block


@dataclass
class BlockSpec:
    """A block to be: ``parts`` are (parameter's name in the module, rows or None)."""

    suffix: str
    parts: list[tuple[str, slice | None]]
    axis: int = 1
    diagonal: tuple[str, ...] = ()  # factors to keep diagonal
    elementwise: bool = False  # always a Diagonal structure
    repeated: bool | None = None  # True: a sample uses the weights at several positions, whatever its shape
    shown: bool = True  # the layer's input and output's gradient tell the block's gradient


class Layer:
    """The default: nothing claimed, nothing seen."""

    low_rank = False  # whether the gradient is a low-rank product of few positions that costs nothing to see

    def specs(self, module: nn.Module) -> list[BlockSpec]:
        return []

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """The layer's input as (positions, inputs), without the bias's column of ones; None if it cannot be told."""
        return None

    def repeated(self, x: Tensor) -> bool:
        """Whether a sample of the layer's input uses the weights at several positions."""
        return False

    def separable(self, module: nn.Module, x: Tensor, e: Tensor) -> bool:
        """Whether the rows are many times as large as the input, and those of some samples of x and e are a part."""
        return False

    def output_gradients(self, module: nn.Module, e: Tensor) -> Tensor:
        """The output's gradient as (positions, m)."""
        return e.reshape(-1, e.shape[-1])

    def rows(self, block: Block, x: Tensor, e: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """a (positions, n) and e (positions', m), with the columns of the block's parts: the block's gradient is eᵀa.

        positions is positions' times the layer's groups, a group at a time. None where the layer does not show them.
        ``out``: memory for a, where it has to be put together.
        """
        module = block.layer
        assert module is not None
        a, e = self.inputs(module, x), self.output_gradients(module, e)
        if a is None or a.shape[0] % max(e.shape[0], 1):
            return None
        columns = [a] if any(part.held_as(module, "weight") for part in block.parts) else []
        if any(part.held_as(module, "bias") for part in block.parts):
            columns.append(a.new_ones(a.shape[0], 1))
        if not columns:  # the parameters were replaced
            return None
        a = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1, out=out)
        if (e.shape[1], a.shape[1]) != block.shape:  # a subclass whose forward does something else
            return None
        return a, e

    def product(self, block: Block, a: Tensor, e: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """eᵀ(a r) (m,), of the rows and a vector r (n,), and Σ over positions of |eᵢ|²(aᵢ·r)²."""
        groups = max(a.shape[0] // max(e.shape[0], 1), 1)
        y = (a.to(r.dtype) @ r).reshape(groups, e.shape[0])
        e = e.to(r.dtype).unflatten(1, (groups, -1))  # (positions, groups, m/groups)
        return torch.einsum("gp,pgm->gm", y, e).reshape(-1), (y.T.square() * e.square().sum(2)).sum()

    def contributing(self, block: Block, a: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of positions that a loss depends on: where it leaves some out, inputs there tell nothing of it."""
        there = e.any(1)
        groups = a.shape[0] // max(e.shape[0], 1)
        return (a[there] if groups <= 1 else a.unflatten(0, (groups, -1))[:, there].flatten(0, 1)), e[there]

    def statistics(self, block: Block, a: Tensor, e: Tensor, count: float) -> LayerStatistics | Aux:
        """What tells the block's second moments, from the rows of all calls of its layer.

        ``count``: the independent terms over which the loss is the mean.
        """
        return LayerStatistics(a.to(block.dtype), e.to(block.dtype), count)


class Linear(Layer):
    """weight (out, in), bias (out,) -> (out, in + 1)."""

    low_rank = True

    def specs(self, module: nn.Module) -> list[BlockSpec]:
        return [BlockSpec("", [("weight", None), ("bias", None)])]

    def repeated(self, x: Tensor) -> bool:
        return x.ndim > 2

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor | None:
        return x.reshape(-1, x.shape[-1])


class TransposedLinear(Layer):
    """weight (in, out), and bias (out,) by itself. The gradient is inputsᵀ·(output gradients): these are a, those e."""

    def specs(self, module: nn.Module) -> list[BlockSpec]:
        return [
            BlockSpec("", [("weight", None)]),
            BlockSpec("bias", [("bias", None)], axis=0, elementwise=True),
        ]

    def repeated(self, x: Tensor) -> bool:
        return x.ndim > 2

    def _is_bias(self, block: Block) -> bool:
        assert block.layer is not None
        return block.parts[0].held_as(block.layer, "bias")

    def rows(self, block: Block, x: Tensor, e: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        e, x = e.reshape(-1, e.shape[-1]), x.reshape(-1, x.shape[-1])
        found = (e.new_ones(e.shape[0], 1), e) if self._is_bias(block) else (e, x)
        sizes = found[1].shape[1], found[0].shape[1]
        return found if found[0].shape[0] == found[1].shape[0] and sizes == block.shape else None

    def contributing(self, block: Block, a: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        there = (e if self._is_bias(block) else a).any(1)
        return a[there], e[there]

    def statistics(self, block: Block, a: Tensor, e: Tensor, count: float) -> LayerStatistics | Aux:
        if "rows" not in block.structure.moments:
            return super().statistics(block, a, e, count)
        a, e = a.to(block.dtype) * count**0.5, e.to(block.dtype) / max(e.shape[0], 1) ** 0.5
        R, L = list(block.structure.fishleg_aux.values())[:2]  # their layouts
        return {"rows": cross(e.T, e.T, R), "columns": cross(a.T, a.T, L)}


class Conv(Layer):
    """weight (out, in/groups, *kernel), bias (out,) -> (out, in/groups·|kernel| + 1).

    Inputs are seen in one and two dimensions.
    """

    def specs(self, module: nn.Module) -> list[BlockSpec]:
        return [BlockSpec("", [("weight", None), ("bias", None)], repeated=True)]

    def separable(self, module: nn.Module, x: Tensor, e: Tensor) -> bool:
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        return x.ndim == e.ndim == len(module.kernel_size) + 2 and x.shape[0] == e.shape[0] > 1

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor | None:
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        dims = len(module.kernel_size)
        if dims > 2:
            return None
        x = x if x.ndim == dims + 2 else x[None]
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
        if dims == 1:
            x, kernel, dilation, stride = x[:, :, None], (1, *kernel), (1, *dilation), (1, *stride)
        patches = F.unfold(x, kernel, dilation=dilation, stride=stride)  # (batch, in·|kernel|, positions)
        return patches.unflatten(1, (module.groups, -1)).permute(1, 0, 3, 2).flatten(0, 2)

    def output_gradients(self, module: nn.Module, e: Tensor) -> Tensor:
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        e = e if e.ndim == len(module.kernel_size) + 2 else e[None]
        return e.flatten(2).mT.flatten(0, 1)


class Embedding(Layer):
    """weight (vocab, dim), with a diagonal factor on the vocabulary's side."""

    def specs(self, module: nn.Module) -> list[BlockSpec]:
        return [BlockSpec("", [("weight", None)], diagonal=("R",))]

    def repeated(self, x: Tensor) -> bool:
        return x.ndim > 1

    def rows(self, block: Block, x: Tensor, e: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """The words (positions,) and e (positions, dim), without padding."""
        assert isinstance(block.layer, nn.Embedding)
        structure = block.structure
        if "rows" not in structure.moments or next(iter(structure.fishleg_aux.values())).ndim != 1:
            return None
        words, e = x.reshape(-1), self.output_gradients(block.layer, e)
        if block.layer.padding_idx is None:
            return words, e
        real = words != block.layer.padding_idx
        return words[real], e[real]

    def product(self, block: Block, a: Tensor, e: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        y = e.to(r.dtype) @ r
        return y.new_zeros(block.shape[0]).index_add_(0, a, y), y.square().sum()

    def statistics(self, block: Block, a: Tensor, e: Tensor, count: float) -> LayerStatistics | Aux:
        """rows = how often each word occurs (the second moment of one-hot inputs), columns = count·Σ e eᵀ."""
        words, e = a, e.to(block.dtype)
        _, L = list(block.structure.fishleg_aux.values())[:2]  # its layout
        rows = torch.bincount(words, minlength=block.shape[0]).to(e.dtype) / max(words.numel(), 1)
        return {"rows": rows, "columns": cross(e.T, e.T, L) * count}


class Norm(Layer):
    """Elementwise weight and bias: one diagonal block."""

    def specs(self, module: nn.Module) -> list[BlockSpec]:
        return [BlockSpec("", [("weight", None), ("bias", None)], axis=0, elementwise=True)]

    def batched(self, module: nn.Module, x: Tensor) -> tuple[Tensor, list[int]] | None:
        """x with its samples in the first dimension, and the dimensions that have no weights of their own, but that."""
        return None

    def normalized(self, module: nn.Module, x: Tensor) -> Tensor:
        """What the layer multiplies by its weight, of the batched x."""
        raise NotImplementedError(f"{type(self).__name__} has batched but no normalized")

    def rows(self, block: Block, x: Tensor, e: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """Ones (samples, 1) and the gradient of each sample (samples, m), the normalized input taken as it is."""
        module = block.layer
        assert module is not None
        found = self.batched(module, x) if class_of(module) in LAYERS else None  # a subclass may normalize otherwise
        if found is None or e.shape != x.shape:
            return None
        x, others = found
        e = e.reshape(x.shape)
        columns = []
        for part in block.parts:
            if part.held_as(module, "weight"):
                g = e * self.normalized(module, x)
            elif part.held_as(module, "bias"):
                g = e
            else:  # the parameters were replaced
                return None
            columns.append((g.sum(others) if others else g).reshape(x.shape[0], -1).to(block.dtype))
        return columns[0].new_ones(x.shape[0], 1), torch.cat(columns, dim=1)


class LastDimensionsNorm(Norm):
    """LayerNorm and RMSNorm: weights for each entry of the last dimensions, over which they normalize."""

    def batched(self, module: nn.Module, x: Tensor) -> tuple[Tensor, list[int]] | None:
        assert isinstance(module, (nn.LayerNorm, nn.RMSNorm))
        own = len(module.normalized_shape)
        x = x if x.ndim > own else x[None]
        return x, list(range(1, x.ndim - own))

    def normalized(self, module: nn.Module, x: Tensor) -> Tensor:
        if isinstance(module, nn.RMSNorm):
            return F.rms_norm(x, module.normalized_shape, None, module.eps)
        assert isinstance(module, nn.LayerNorm)
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)


class ChannelNorm(Norm):
    """BatchNorm, InstanceNorm and GroupNorm: a weight for each channel, the second dimension of a batch."""

    def batched(self, module: nn.Module, x: Tensor) -> tuple[Tensor, list[int]] | None:
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and x.ndim == module._get_no_batch_dim():
            x = x[None]
        return x, list(range(2, x.ndim))

    def normalized(self, module: nn.Module, x: Tensor) -> Tensor:
        if isinstance(module, nn.GroupNorm):
            return F.group_norm(x, module.num_groups, eps=module.eps)
        assert isinstance(module, nn.modules.batchnorm._NormBase)
        by_batch = module.training or module.running_mean is None
        statistics = (None, None) if by_batch else (module.running_mean, module.running_var)
        normalize = F.instance_norm if isinstance(module, nn.modules.instancenorm._InstanceNorm) else F.batch_norm
        return normalize(x, *statistics, None, None, by_batch, 0.0, module.eps)


class Attention(Layer):
    """The packed in-projection as three blocks q, k, v. The out-projection is a child layer and claims itself."""

    def specs(self, module: nn.Module) -> list[BlockSpec]:
        assert isinstance(module, nn.MultiheadAttention)
        d = module.embed_dim
        packed = module.in_proj_weight is not None
        specs = []
        for i, name in enumerate("qkv"):
            rows = slice(i * d, (i + 1) * d)
            weight = ("in_proj_weight", rows) if packed else (f"{name}_proj_weight", None)
            specs.append(BlockSpec(name, [weight, ("in_proj_bias", rows)], repeated=True, shown=False))
        return specs


LAYERS: dict[type[nn.Module], Layer] = {
    nn.Linear: Linear(),
    nn.Conv1d: Conv(),
    nn.Conv2d: Conv(),
    nn.Conv3d: Conv(),
    nn.Embedding: Embedding(),
    nn.LayerNorm: LastDimensionsNorm(),
    nn.RMSNorm: LastDimensionsNorm(),
    nn.GroupNorm: ChannelNorm(),
    nn.BatchNorm1d: ChannelNorm(),
    nn.BatchNorm2d: ChannelNorm(),
    nn.BatchNorm3d: ChannelNorm(),
    nn.SyncBatchNorm: Norm(),  # whose statistics are not this process's alone
    nn.InstanceNorm1d: ChannelNorm(),
    nn.InstanceNorm2d: ChannelNorm(),
    nn.InstanceNorm3d: ChannelNorm(),
    nn.MultiheadAttention: Attention(),
}

OTHERS = {"transformers.pytorch_utils.Conv1D": TransposedLinear()}  # of libraries that are not imported here

_UNKNOWN = Layer()


def constant_row(module: nn.Module, name: str) -> int | None:
    """A row of a module's parameter that its backward pass takes as a constant: an embedding's of padding."""
    if name == "weight" and isinstance(module, nn.Embedding):
        return module.padding_idx
    return None


def class_of(module: nn.Module) -> type:
    """The module's class, without what ``fully_shard`` puts before it."""
    bases = type(module).__bases__
    return bases[1] if bases[0].__name__ == "FSDPModule" and len(bases) == 2 else type(module)


def layer_of(module: nn.Module) -> Layer:
    """The row for a module's class or its nearest base."""
    for c in type(module).__mro__:
        found = LAYERS.get(c) or OTHERS.get(f"{c.__module__}.{c.__qualname__}")
        if found is not None:
            return found
    return _UNKNOWN
