"""Auxiliary passes through the user's model that leave it as it was.

Untouched: parameters, ``.grad``, BatchNorm statistics and other buffers, random generators, the captured inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from .capture import AuxBatches, Inputs, InputTap, private_rng, tree_map
from .likelihoods import Likelihood

Draw = Callable[[nn.Module, Any], Any]
Nll = Callable[[nn.Module, Any, Any], Tensor]


class _Shell(nn.Module):
    """Model and likelihood under one roof, so that one functional_call replaces the tensors of both."""

    def __init__(self, model: nn.Module, likelihood: Likelihood | None) -> None:
        super().__init__()
        self.model = model
        if likelihood is not None:
            self.likelihood = likelihood

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside DataParallel, DistributedDataParallel or torch.compile's wrapper."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def output_tensor(outputs: Any) -> Tensor:
    """The tensor a likelihood scores: the output itself, or its ``logits``. TypeError otherwise."""
    outputs = getattr(outputs, "logits", outputs)
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"the model's output should be a tensor, or have one as .logits, but is: {type(outputs).__name__}; "
            "pass draw and nll functions of your own with fisher='hessian' and no likelihood"
        )
    return outputs


class Passes:
    """Batches, drawn labels and losses of one model.

    Where the user gave ``draw`` and ``nll`` functions these make the drawn-label loss, a mean over the batch; the
    likelihood does otherwise.
    """

    def __init__(
        self,
        model: nn.Module,
        draw: Draw | None,
        nll: Nll | None,
        likelihood: Likelihood | None,
        loader: Any,
        seed: int,
    ) -> None:
        self.model, self.likelihood = unwrapped(model), likelihood
        self._own = None if draw is None or nll is None else (draw, nll)
        self.shell = _Shell(self.model, likelihood)
        self.devices = sorted({p.device for p in self.shell.parameters()}, key=str)
        self._sparse = [m for m in self.model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse]
        self.forward_mode = True  # until an operation of the model turns out to lack a forward derivative
        self.generator = torch.Generator().manual_seed(seed)
        self.tap = None if loader is not None else InputTap(model)
        self.loader = None if loader is None else AuxBatches(loader, self.devices)

    def seed(self) -> int:
        """A fresh seed from the optimizer's own generator."""
        return int(torch.randint(2**62, (), generator=self.generator))

    def inputs(self) -> Inputs:
        """The next batch, whole.

        RuntimeError before the model was given any input, ValueError where the loader is empty.
        """
        if self.loader is not None:
            item = self.loader.next(self.seed)
            x = item[0] if isinstance(item, (tuple, list)) and len(item) else item
            return Inputs.of(tree_map(lambda t: t.to(self.devices[0], non_blocking=True), x))
        assert self.tap is not None
        if self.tap.last is None:
            raise RuntimeError(
                "no curvature batch yet: the model was given no input with gradients enabled since the "
                "optimizer was made. "
                "Run a forward pass before step() or pretrain_aux(), or pass aux_loader"
            )
        return self.tap.last.detached()

    @contextmanager
    def apart(self, inputs: Inputs, seed: int) -> Iterator[None]:
        """Random generators, autocast and input capture as an auxiliary pass needs them; restored afterwards."""
        with ExitStack() as stack:
            stack.enter_context(private_rng(seed, self.devices))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused kernels have no forward or double derivative
            stack.enter_context(torch.enable_grad())
            if inputs.autocast is not None:
                stack.enter_context(torch.autocast(self.devices[0].type, inputs.autocast))
            if self.tap is not None:
                stack.enter_context(self.tap.pause())
            for module in self._sparse:  # sparse gradients have no forward or double derivative either
                module.sparse = False
                stack.callback(setattr, module, "sparse", True)
            yield

    def run(self, function: Callable[[], Any], replaced: Mapping[int, Tensor] | None = None) -> Any:
        """``function()`` while the model holds copies of its buffers, and ``replaced`` (by id) for parameters."""
        tensors = {id(b): b.clone() for b in self.shell.buffers()} | dict(replaced or {})
        # Place by place, as they are now: torch's own tying of weights restores a module that is used twice wrongly.
        named = {
            f"{path}.{name}": tensors[id(t)]
            for path, module in self.shell.named_modules()
            for name, t in (*module._parameters.items(), *module._buffers.items())
            if id(t) in tensors
        }
        return functional_call(self.shell, named, (function,), tie_weights=False)

    def outputs(self, inputs: Inputs) -> Tensor:
        """The model's outputs, as the likelihood takes them."""
        return output_tensor(self.model(*inputs.args, **inputs.kwargs))

    def draw(self, inputs: Inputs) -> Any:
        """Labels drawn from the model."""
        with torch.no_grad():
            if self._own is not None:
                return self._own[0](self.model, inputs.x())
            assert self.likelihood is not None
            return self.likelihood.draw(self.outputs(inputs))

    def nll(self, inputs: Inputs, labels: Any) -> Tensor:
        if self._own is not None:
            return self._own[1](self.model, inputs.x(), labels)
        assert self.likelihood is not None
        return self.likelihood.nll(labels, self.outputs(inputs))

    def drawn_loss(self, inputs: Inputs) -> tuple[Tensor, int]:
        """The nll on labels drawn from the model, and over how many independent terms it is the mean."""
        if self._own is not None:
            return self.nll(inputs, self.draw(inputs)), inputs.size()
        return self.likelihood_loss(inputs)

    def likelihood_loss(self, inputs: Inputs) -> tuple[Tensor, int]:
        """``drawn_loss`` by the likelihood where there is one: one forward pass, and the exact number of terms."""
        if self.likelihood is None:
            return self.drawn_loss(inputs)
        outputs = self.outputs(inputs)
        with torch.no_grad():
            labels = self.likelihood.draw(outputs)
        return self.likelihood.nll(labels, outputs), self.likelihood.terms(outputs)
