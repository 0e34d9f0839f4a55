"""Auxiliary passes through the user's model that leave it as it was.

Untouched: parameters, ``.grad``, BatchNorm statistics and other buffers, random generators, the captured inputs, and
what ``attributes`` knows of beside them.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..likelihoods import Likelihood
from ..model.block import is_sharded
from .attempts import Attempts
from .attributes import KeptApart, only_stock
from .batch_rule import BatchRule, Call
from .generators import Seeds, private_rng
from .hooks import only_units_hooks
from .inputs import EmptyBatch, Inputs, Memo, Writes, output_shapes, shape_of, tree_map, version
from .loader import AuxBatches
from .outputs import left_out, output_tensor
from .taps.inputs import InputTap, Pausable
from .taps.targets import TargetTap

Draw = Callable[[nn.Module, Any], Any]
Nll = Callable[[nn.Module, Any, Any], Tensor]


class _ModelAndLikelihood(nn.Module):
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
        elif "_orig_mod" in model._modules:  # a scripted module's are no dict
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            return model


SMALL = 2**20  # numbers that are copied for a pass however few the model trains
LEAST, MOST = 4, 32  # samples in a batch whose size is "auto"


def _tensors(slots: Iterable[Mapping[str, Tensor | None]]) -> list[Tensor]:
    """Each tensor once."""
    return list({id(t): t for tensors in slots for _, t in tensors.items() if t is not None}.values())


def _copies(params: Sequence[Tensor], buffers: Sequence[Tensor]) -> dict[int, Tensor]:
    """What a pass has in place of buffers and, unless they are most of a large model, frozen parameters, by id."""
    frozen = [p for p in params if not p.requires_grad]
    count = sum(p.numel() for p in frozen)
    few = count <= max(SMALL, sum(p.numel() for p in params) - count)
    return {id(t): t.detach().clone() for t in (*buffers, *(frozen if few else ()))}


def _tuples(x: Any) -> Any:
    """Nested lists as tuples, as they were before they became text."""
    return tuple(map(_tuples, x)) if isinstance(x, list) else x


class _Recorder:
    """Stands in for ``model.forward`` during a user's function, and notes what the model is given."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.call: tuple[tuple, dict[str, Any]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.call = args, kwargs
        return self.forward(*args, **kwargs)


_PART = (
    "(in a pass of FishLeg's over a part of a batch; if the model takes whole batches only, pass curvature_batch=None)"
)
_NAMED = (
    "(a batch of aux_loader that is a mapping is given to the model as named arguments, all of it: let the loader give "
    "what the model takes alone, without labels, or as (x, ...), of which x is given)"
)


class IsolatedPasses:
    """Batches, drawn labels and losses of one model.

    Where the user gave ``draw`` and ``nll`` functions these make the drawn-label loss, a mean over the batch; the
    likelihood does otherwise. ``rank``: of this process among several, each of which draws other labels.
    """

    def __init__(
        self,
        model: nn.Module,
        draw: Draw | None,
        nll: Nll | None,
        likelihood: Likelihood | None,
        loader: Any,
        seed: int,
        user: object | None = None,
        taps: Sequence[Pausable] = (),
        may_cut: bool = True,
        rank: int = 0,
    ) -> None:
        self.model, self.likelihood = unwrapped(model), likelihood
        self._own = None if draw is None or nll is None else (draw, nll)
        self.root = _ModelAndLikelihood(self.model, likelihood)
        self.device = next(self.root.parameters()).device
        self.devices = sorted({p.device for p in self.root.parameters()}, key=str)
        modules = list(self.model.modules())
        bags = [m for m in modules if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
        self._embeddings = [m for m in bags if m.sparse or m.max_norm is not None]
        self._sharded = any(map(is_sharded, self.root.parameters()))
        self._recurrent = any(isinstance(m, nn.RNNBase) for m in modules)
        self._attempts: dict[tuple[str, str], Attempts] = {}
        self.checkpointed = False  # whether modules were seen to run once more during a backward pass
        self._told: set[str] = set()
        self.tell: Callable[[str], None] = partial(warnings.warn, stacklevel=4)
        self.generator = Seeds(seed, rank)
        self._writes = Writes()
        self.tap = None if loader is not None else InputTap.on(model, user)
        self.loader = None if loader is None else AuxBatches(loader, self.devices)
        self.targets = None if likelihood is None or self.tap is None else TargetTap(likelihood, self.tap)
        self.taps = taps  # which see the user's passes alone
        self._settle: Callable[[], None] = lambda: None
        self._batches = BatchRule(self._raw_outputs, may_cut, fatal=any(d.type != "cpu" for d in self.devices))

    def together(self, settle: Callable[[], None], agreed: Callable[[Sequence[bool]], list[bool]]) -> None:
        """All ranks take the same passes from here on, as the model's units exchange parameters while they run.

        ``settle`` has every unit hold its own alone; ``agreed``: which of several things hold on all ranks.
        """
        self._settle, self._batches.agreed = settle, agreed

    def attempts(self, fisher: str, way: str) -> Attempts:
        """Of products of this kind in this way, which the model may not lend itself to."""
        return self._attempts.setdefault((fisher, way), Attempts())

    def mode(self) -> tuple[bool, ...]:
        """Which modules are in training: what may change a model's operations."""
        return tuple(module.training for module in self.root.modules())

    def tell_once(self, subject: str, message: str) -> None:
        """Tell what the user should know, once."""
        if subject not in self._told:
            self._told.add(subject)
            self.tell(message)

    def seed(self) -> int:
        """A fresh seed from the optimizer's own generator."""
        return self.generator.draw()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, integers and text: where the generator of seeds and the loader are, and what earlier
        passes have taught.
        """
        loader = {} if self.loader is None else self.loader.state()
        seed, draws = self.generator.get_state()
        attempts = [(*way, attempts.state()) for way, attempts in self._attempts.items()]
        calls = None if self.tap is None else self.tap.state()
        learned = json.dumps((self._batches.state(), calls, attempts, self.checkpointed))
        places = {f"loader_{name}": value for name, value in loader.items()}
        return {"seed": seed, "draws": draws, **places, "learned": learned}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint."""
        if "generator" in state:  # before version 2
            self.generator.go_on_from(state["generator"])
        else:
            self.generator.set_state((state["seed"], state["draws"]))
        if self.loader is not None and "loader_seed" in state:
            self.loader.load({"seed": state["loader_seed"], "taken": state["loader_taken"]})
        if "learned" in state:
            batches, calls, attempts, self.checkpointed = _tuples(json.loads(state["learned"]))
            self._batches.load(batches)
            self._attempts = {(fisher, way): Attempts().load(known) for fisher, way, known in attempts}
            if self.tap is not None and calls is not None:
                self.tap.load(calls)

    @contextmanager
    def unnoticed(self) -> Iterator[None]:
        """Passes inside leave seeds, batches and what is known of the model as they were."""
        before = {name: value for name, value in self.state().items() if not name.startswith("loader_")}
        with nullcontext() if self.loader is None else self.loader.looking_ahead():
            try:
                yield
            finally:
                self.load(before)

    def inputs(self, size: int | str | None = None) -> Inputs:
        """The next batch, of at most ``size`` samples; "auto": 32, and of a batch trained on a quarter, but 4.

        RuntimeError before the model was given any input, ValueError where the loader is empty, EmptyBatch where the
        batch is.
        """
        try:
            inputs, earlier = self._next()
        except Exception:
            self._batches.abstain()
            raise
        inputs = self._batches.resolved(inputs, earlier, size if isinstance(size, int) else None)
        if size == "auto":
            size = MOST if self.loader is not None else min(MOST, max(LEAST, inputs.size() // 4))
        assert not isinstance(size, str)
        inputs = replace(inputs, mask=self._mask(inputs), targets=self._targets(inputs))
        inputs = (inputs if size is None else inputs.rows(0, size)).copied()
        if inputs.mask is not None and not inputs.mask.any():
            raise EmptyBatch("a curvature batch should have positions that count in the loss but has none")
        if self._own is not None and self.likelihood is not None and self.loader is not None:
            self._record_call(inputs)
        return inputs

    def _next(self) -> tuple[Inputs, Call | None]:
        """The next batch, whole, and an earlier call of another size."""
        earlier = None
        if self.loader is not None:
            item = self.loader.next(self.seed)
            x = item[0] if isinstance(item, (tuple, list)) and len(item) else item
            inputs = Inputs.of(tree_map(lambda t: t.to(self.device, non_blocking=True), x))
        elif self.tap is not None and self.tap.last is not None:
            inputs, earlier = self.tap.last, self.tap.earlier
        elif any(p.grad is not None for p in self.root.parameters()):
            raise RuntimeError(
                f"no curvature batch yet: parameters have gradients, but the module given to FishLeg, "
                f"{type(self.model).__name__}, was not itself called with gradients enabled since the optimizer was "
                "made: probably its layers were, another of its methods, or another module that holds them. Give "
                "FishLeg the module that the loop calls, let its forward do what the loop does, or pass aux_loader"
            )
        else:
            raise RuntimeError(
                "no curvature batch yet: the model was given no input with gradients enabled since the optimizer was "
                "made. Run a forward pass before step() or pretrain_aux(), or pass aux_loader"
            )
        if inputs.empty:
            raise EmptyBatch("a curvature batch should have samples but has none")
        return inputs, earlier

    def leaves_out(self) -> bool:
        """Whether not all positions count in the loss of the batch that was last trained on."""
        seen = None if self.tap is None else self.tap.last
        return seen is not None and self._mask(seen) is not None

    def labelled(self) -> bool:
        """Whether the targets of the batch that was last trained on are known."""
        seen = None if self.tap is None else self.tap.last
        return seen is not None and self._targets(seen) is not None

    def _targets(self, inputs: Inputs) -> Tensor | None:
        """What a whole batch was trained on."""
        if self.targets is None or self._own is not None:
            return None
        return self.targets.of(inputs.outputs or ())

    def _mask(self, inputs: Inputs) -> Tensor | None:
        """The positions of the outputs that count in the loss of a whole batch; None where all do."""
        if self.likelihood is None:
            return None
        mask = self.likelihood.mask_of(inputs.args, inputs.kwargs)
        if mask is None and self.loader is None:
            mask = self.likelihood.scored
            outputs = next((shape for shape in inputs.outputs or () if shape), None)
            there = None if outputs is None else self.likelihood.positions(outputs)
            if mask is not None and mask.shape != there:
                if not bool(mask.all()):
                    self.tell_once(
                        "mask",
                        f"the loss leaves out positions, but targets have shape {tuple(mask.shape)} and the model's "
                        f"outputs positions of shape {there}: FishLeg takes the curvature over all of them; a "
                        "likelihood's loss_mask tells which count",
                    )
                return None
        return None if mask is None or bool(mask.all()) else mask

    def _record_call(self, inputs: Inputs) -> None:
        """What the user's own draw(model, x) calls the model with, which need not be x: ask it once."""
        assert self._own is not None
        before = self.model.__dict__.get("forward")
        recorder = _Recorder(self.model.forward)
        self.model.forward = recorder
        try:
            self.run(inputs, self.seed(), lambda: self.draw(inputs))
        finally:
            del self.model.__dict__["forward"]
            if before is not None:
                self.model.__dict__["forward"] = before
        if recorder.call is not None:
            memo: Memo = {id(x): (x, x) for x in inputs.over_batch}
            inputs.args, inputs.kwargs = tree_map(Tensor.detach, recorder.call, memo)
            if any(id(x) not in memo for x in replace(inputs, x=None).leaves(inputs.samples)):
                inputs.over_batch = ()  # the model is given something else than x

    def run(self, inputs: Inputs, seed: int, function: Callable[[], Any], twice: bool = False) -> Any:
        """``function()``, gradients enabled, apart from everything that the user's own passes use or change.

        Random generators start from ``seed``, buffers are copies, and so are frozen parameters where they are not most
        of a large model; autocast is as it was when the inputs were captured. One pass at a time, in all threads.
        ``twice``: forward-mode or second derivatives are taken, which fused kernels do not have.
        Backward passes belong inside too: a checkpointed module runs its forward again during them.
        """
        self._settle()
        modules = list(self.root.modules())
        params, buffers = _tensors(module._parameters for module in modules), _tensors(m._buffers for m in modules)
        if self._sharded:  # which its units exchange for whole ones while they run
            params = [p for p in params if not is_sharded(p)]
        foreign = self._own is not None or not only_stock(modules)
        with ExitStack() as stack:
            stack.callback(self._settle)  # after a pass without a backward pass some are left whole
            stack.enter_context(private_rng(seed, self.devices, foreign))
            stack.enter_context(torch.enable_grad())
            if twice:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if twice and self._recurrent and self.device.type == "cuda":
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            if "torch._dynamo" in sys.modules:  # modules compiled in place have first derivatives alone
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if inputs.autocast is not None:
                stack.enter_context(torch.autocast(self.device.type, inputs.autocast))
            if self.tap is not None:
                stack.enter_context(self.tap.pause())
            for tap in self.taps:
                stack.enter_context(tap.pause())
            if self.likelihood is not None:
                for name in ("scored", "noted"):
                    stack.callback(setattr, self.likelihood, name, getattr(self.likelihood, name))
            copies = _copies(params, buffers)
            if foreign:
                known = {id(t): (t, copies.get(id(t), t)) for t in (*params, *buffers)}
                kept = KeptApart(known, max(SMALL, sum(p.numel() for p in params if p.requires_grad)))
                stack.callback(self._restore, kept)
                kept.hold(modules, self._own or (), inputs.objects())
            for module in self._embeddings:
                # Sparse gradients have no second derivative either. Weights that are too long have been shortened.
                stack.callback(module.__dict__.update, sparse=module.sparse, max_norm=module.max_norm)
                module.sparse, module.max_norm = False, None
            for p in params:  # hooks on gradients are for those that are trained on
                if hooks := p._backward_hooks:
                    p._backward_hooks = None
                    stack.callback(setattr, p, "_backward_hooks", hooks)
            stack.callback(self._look_for_writes, [(p, version(p)) for p in params if id(p) not in copies])
            try:
                return self.replaced(copies, function)
            except Exception as error:
                if inputs.part and error.args and isinstance(error.args[0], str):
                    error.args = (f"{error.args[0]}\n{_PART}", *error.args[1:])
                if self.loader is not None and inputs.kwargs and "unexpected keyword argument" in str(error):
                    error.args = (f"{error.args[0]}\n{_NAMED}", *error.args[1:])
                raise

    def _restore(self, kept: KeptApart) -> None:
        kept.restore()
        if kept.written:
            self._tell_of_writes("a large tensor of its own")

    def _look_for_writes(self, before: Sequence[tuple[Tensor, int]]) -> None:
        written = {id(p) for p, known in before if version(p) != known}
        if written:
            names = [name.partition(".")[2] for name, p in self.root.named_parameters() if id(p) in written]
            self._tell_of_writes(f"parameter {names[0]!r}")

    def _tell_of_writes(self, what: str) -> None:
        self.tell_once(
            "written",
            f"the model's forward writes to {what} in place, and did so in a pass of FishLeg's too, which cannot be "
            "undone",
        )

    def replaced(
        self,
        tensors: Mapping[int, Tensor],
        function: Callable[[], Any],
        places: Mapping[tuple[int, str], Tensor] | None = None,
    ) -> Any:
        """``function()`` while the model holds ``tensors`` in place of parameters and buffers, by id, and some modules
        others: ``places``, by the module's id and the name there.
        """
        # Place by place, as they are now: torch's own tying of weights restores a module that is used twice wrongly.
        places = places or {}
        named = {
            f"{path}.{name}": places.get((id(module), name), tensors[id(t)])
            for path, module in self.root.named_modules()
            for name, t in (*module._parameters.items(), *module._buffers.items())
            if id(t) in tensors
        }
        return functional_call(self.root, named, (function,), tie_weights=False)

    def _raw_outputs(self, inputs: Inputs) -> Any:
        """What a pass returns, to be looked at: of the model, or the user's own draw where nothing else is known."""
        own = self._own is not None and self.loader is not None
        return self.run(inputs, 0, lambda: self.draw(inputs) if own else self._called(inputs))

    def outputs(self, inputs: Inputs) -> Tensor:
        """The model's outputs, as the likelihood takes them."""
        returned = self._called(inputs)
        outputs = output_tensor(returned)
        if others := left_out(returned, outputs):
            kind, shapes = type(returned).__name__, ", ".join(str(shape_of(t)) for t in others)
            self.tell_once(
                "left out",
                f"the model returns a {kind}, of which the likelihood is given the first tensor alone, of shape "
                f"{shape_of(outputs)}{' for a part of the batch' if inputs.part else ''}, and not those of shape "
                f"{shapes}. That is right where the loss has them in "
                "penalties at most, as a VAE has its mean and variance. If they are outputs too, several heads say, "
                "let the model return one tensor of them all, for a Likelihood of your own that splits it; or give "
                "FishLeg draw= and nll= without likelihood=",
            )
        doubt = None if self.likelihood is None else self.likelihood.doubt(outputs)
        if doubt is not None:
            self.tell_once("likelihood", doubt)
        return outputs

    def _apart(self, inputs: Inputs, call: Callable[[Inputs], Any]) -> Any:
        """``call(inputs)``, with copies where it writes to them: several passes are given one batch."""
        if not (self._writes.expected or (self.tap is not None and self.tap.writes.seen)):
            return call(inputs)
        inputs = inputs.copied()
        tensors = [x for x in inputs.leaves() if isinstance(x, Tensor)]
        versions = [*map(version, tensors)]
        found = call(inputs)
        self._writes.look(tensors, versions)
        return found

    def _called(self, inputs: Inputs) -> Any:
        return self._apart(inputs, self._called_once)

    def _called_once(self, inputs: Inputs) -> Any:
        tap, past_hooks = self.tap, inputs.tapped and self.model.__dict__.get("forward") is self.tap
        if tap is None or not past_hooks:
            return self.model(*inputs.args, **inputs.kwargs)
        if self._sharded:  # whose parameters are whole within its hooks alone
            with only_units_hooks(self.model):
                return self.model(*inputs.args, **inputs.kwargs)
        outputs = tap.inner(*inputs.args, **inputs.kwargs)
        # What was seen is past the model's pre-hooks, which apply once; the others change what it returns.
        for key, hook in list(self.model._forward_hooks.items()):
            given = (inputs.args, inputs.kwargs) if key in self.model._forward_hooks_with_kwargs else (inputs.args,)
            changed = hook(self.model, *given, outputs)
            outputs = outputs if changed is None else changed
        return outputs

    def draw(self, inputs: Inputs) -> Any:
        """Labels drawn from the model, off the graph: the user's functions may differentiate by their inputs."""
        if self._own is not None:
            draw = self._own[0]
            return tree_map(Tensor.detach, self._apart(inputs, lambda inputs: draw(self.model, inputs.x)))
        outputs = self.outputs(inputs).detach()
        with torch.no_grad():
            return self.scoring(inputs).draw(outputs)

    def scoring(self, inputs: Inputs) -> Likelihood:
        """The likelihood, of the positions that count."""
        assert self.likelihood is not None
        return self.likelihood if inputs.mask is None else self.likelihood.masked(inputs.mask)

    def nll(self, inputs: Inputs, labels: Any) -> Tensor:
        if self._own is not None:
            nll = self._own[1]
            return self._apart(inputs, lambda inputs: nll(self.model, inputs.x, labels))
        return self.scoring(inputs).nll(labels, self.outputs(inputs))

    def drawn_loss(self, inputs: Inputs) -> tuple[Tensor, int]:
        """The nll on labels drawn from the model, and over how many independent terms it is the mean."""
        if self._own is not None:
            labels = self.draw(inputs)
            return self.nll(inputs, labels), self._terms(inputs, labels)
        return self.likelihood_loss(inputs)

    def _terms(self, inputs: Inputs, labels: Any) -> int:
        """Of the user's own nll: what its ``terms`` says, else the rows of labels, else the samples of the batch."""
        assert self._own is not None
        terms = getattr(self._own[1], "terms", None)
        if callable(terms):
            return int(terms(self.model, inputs.x, labels))
        return next((shape[0] for shape in output_shapes(labels) if shape), inputs.samples or 1)

    def training_targets(self, inputs: Inputs) -> Tensor:
        """What the batch was trained on, for ``scoring(inputs)``."""
        assert inputs.targets is not None
        return inputs.targets if inputs.mask is None else inputs.targets[inputs.mask]

    def training_loss(self, inputs: Inputs) -> Tensor:
        """The nll on that."""
        return self.scoring(inputs).nll(self.training_targets(inputs), self.outputs(inputs))

    def likelihood_loss(self, inputs: Inputs) -> tuple[Tensor, int]:
        """``drawn_loss`` by the likelihood where there is one: one forward pass, and the exact number of terms."""
        if self.likelihood is None:
            return self.drawn_loss(inputs)
        outputs, likelihood = self.outputs(inputs), self.scoring(inputs)
        with torch.no_grad():
            labels = likelihood.draw(outputs)
        return likelihood.nll(labels, outputs), likelihood.terms(outputs)
