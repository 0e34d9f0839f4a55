"""FishLeg as a torch optimizer: validate, gather, dispatch. The maths is in the backends."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import backends, checkpoint, validate
from .assemble import StructureChoice, attach, build_blocks
from .auxiliary import Auxiliary
from .blocks import Block
from .gradient_tap import GradientTap
from .likelihoods import Likelihood
from .passes import Draw, Nll, Passes
from .precision import kernel_precision, operand_dtype, precision_scope
from .reference.thin import Matrix, Split, Thin, vectors


class FishLeg(Optimizer):
    """Natural-gradient descent with a learned inverse Fisher matrix Q(λ) (Garcia, Freddi et al., ICLR 2023).

    Each step: m ← βm + (1−β)g, θ ← θ − lr·(c·Q m̂ + weight_decay·θ). Every ``update_aux_every`` steps, before that, one
    Adam step of λ on 𝒜(λ) = ½ vᵀ(F+γI)v − uᵀv, with v = Q u, u = g/‖g‖ and F the Fisher matrix on a curvature batch.

    Args:
        model: any module. Plain torch layers get a Kronecker-factored Q each, other parameters a diagonal one.
        draw: ``draw(model, x)``: labels sampled from the model. Goes with ``nll``; the likelihood does without both.
        nll: ``nll(model, x, y)``: the mean negative log-likelihood, a scalar.
        likelihood: scores the model's outputs. Its own trainable parameters are trained too.
        aux_loader: gives curvature batches, x or (x, ...), and is re-iterable. Without it they are taken from the
            inputs that the model was last given.
        params: parameters or parameter groups, as any torch optimizer takes them; everything trainable if omitted. A
            group may set lr, weight_decay, beta and maximize.
        lr: step size: a float or a scalar tensor.
        aux_lr, aux_betas, aux_eps: of Adam on λ.
        beta: momentum.
        weight_decay: decoupled, as AdamW's.
        damping: γ > 0, in units of the Fisher matrix.
        update_aux_every: steps between updates of λ; negative: that many updates a step; 0: λ is not learned.
        fisher: "ggn", exact, needs a likelihood; "hessian", "antithetic" and "rank1" use labels drawn from the model.
            None: "ggn" with a likelihood, "hessian" without.
        precondition_aux: multiply the auxiliary loss's gradient by Q.
        learn_scale: False: the auxiliary loss is taken at Q's best multiple, so that it teaches Q's shape alone; its
            scale is without effect under normalize="rms".
        u_sampling: u is the "gradient", the "momentum" (the moving average of g) or "gaussian".
        structure: "kron", "diagkron", "sumkron", "diagonal", or a callable (m, n, **options) -> Structure such as
            ``functools.partial(SumKron, terms=3)``; or a dict of layer-name patterns (fnmatch's) to those, of which
            the first match counts, "kron" elsewhere.
        init: Q₀: "kfac", from the Fisher's Kronecker factors on the first curvature batch, or "sgd", scale·I.
        anchor_every: steps between estimates of Q anew from the Kronecker factors; 0: never, FishLeg pure.
        anchor_decay: of the factors' moving average over those estimates, in [0, 1).
        scale: of "sgd".
        momentum: "before" Q, or "after" it as published.
        nesterov: average the gradient into the momentum once more for the step, as Muon and NAdam do.
        normalize: "rms": each block's update gets root-mean-square 0.2, as Muon's users scale it to AdamW's lr;
            "trust": all get the factor min(1, √(kappa/(lr₀²·mᵀQm))); None: as computed.
        kappa: of "trust".
        curvature_batch: at most so many samples in a Fisher-vector product; None: the whole batch.
        max_factor_size: larger Kronecker factors become block-diagonal.
        thin_gradients: watch linear layers' inputs and output gradients (forward hooks), of which their gradients are
            products: cheaper where the batch is smaller than the layer, and the same but for rounding.
        precision: of the optimizer's own float32 products, "highest", "high" or "medium" as for
            ``torch.set_float32_matmul_precision``, or "tf32x3" (see ``fishleg_fast.precision``); None follows that
            setting.
        backend: None for the best available one; ``python -m fishleg_fast`` tells which there are.
        writer: a tensorboard SummaryWriter (anything with add_scalar), given the diagnostics at updates of λ.
        maximize: ascend.
        capturable: decide everything in a step on the device, without synchronisation.
        seed: of the labels drawn for the curvature, which leave torch's generators alone.

    Raises:
        TypeError, ValueError: an argument is wrong.
        RuntimeError: the named backend is unavailable; in ``step``: λ is not finite, or there is no curvature batch.
    """

    blocks: list[Block]

    def __init__(
        self,
        model: nn.Module,
        draw: Draw | None = None,
        nll: Nll | None = None,
        likelihood: Likelihood | None = None,
        aux_loader: Iterable[Any] | None = None,
        *,
        params: Iterable[Any] | None = None,
        lr: float | Tensor = 1e-2,
        aux_lr: float = 5e-4,
        aux_betas: tuple[float, float] = (0.9, 0.999),
        aux_eps: float = 1e-7,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        damping: float = 0.1,
        update_aux_every: int = 10,
        fisher: str | None = None,
        precondition_aux: bool = False,
        learn_scale: bool = True,
        u_sampling: str = "gradient",
        structure: StructureChoice | Mapping[str, StructureChoice] = "kron",
        init: str = "kfac",
        anchor_every: int = 10,
        anchor_decay: float = 0.9,
        scale: float = 1.0,
        momentum: str = "before",
        nesterov: bool = True,
        normalize: str | None = "rms",
        kappa: float = 1e-3,
        curvature_batch: int | None = 32,
        max_factor_size: int | None = 8192,
        thin_gradients: bool = True,
        precision: str | None = None,
        backend: str | None = None,
        writer: Any = None,
        maximize: bool = False,
        capturable: bool = False,
        seed: int = 0,
    ) -> None:
        default_fisher = "hessian" if likelihood is None else "ggn"
        settings = dict(
            aux_lr=aux_lr, aux_betas=aux_betas, aux_eps=aux_eps, damping=damping, update_aux_every=update_aux_every,
            fisher=default_fisher if fisher is None else fisher, u_sampling=u_sampling,
            precondition_aux=precondition_aux, learn_scale=learn_scale,
            structure=structure, init=init, anchor_every=anchor_every, anchor_decay=anchor_decay,
            scale=scale, momentum=momentum, nesterov=nesterov, normalize=normalize, kappa=kappa,
            curvature_batch=curvature_batch, max_factor_size=max_factor_size,
            precision=precision, writer=writer, seed=seed,
        )  # fmt: skip
        validate.sources(model, draw, nll, likelihood, aux_loader, settings["fisher"])
        validate.settings(settings)
        self.model, self.likelihood, self.settings = model, likelihood, settings
        self._roots = [("", model)]
        if likelihood is not None and all(module is not likelihood for module in model.modules()):
            self._roots.append(("likelihood.", likelihood))
        self._capturable = capturable
        watched = thin_gradients and not capturable  # whether a gradient is thin is decided on the host
        self._gradients = GradientTap(self) if watched else None
        self.blocks = []
        self._grouped: list[list[int]] = []  # the groups and parameters that the blocks were told of
        self._built = False
        defaults = dict(lr=lr, weight_decay=weight_decay, beta=beta, maximize=maximize)
        super().__init__(validate.parameters(self._roots, params), defaults)
        everything = [p for group in self.param_groups for p in group["params"]]
        if not everything:
            raise ValueError(
                "model should have a trainable parameter but has none (does everything have requires_grad=False?)"
            )
        self._take_up(everything)
        self._built = True
        first = everything[0]
        self.backend, self._ops = backends.choose(backend, first.device, first.dtype)
        self._passes = Passes(model, draw, nll, likelihood, aux_loader, seed, self, self._gradients)
        self._aux = Auxiliary(self._passes, settings, self._ops)
        self._counts: dict[str, Any] = dict.fromkeys(
            ("steps", "aux_steps", "anchors", "skipped_steps", "skipped_aux_steps"), 0
        )
        self._last: dict[str, Any] = {}  # what diagnostics() tells of the latest step

    def _take_up(self, params: list[nn.Parameter]) -> None:
        """Blocks, λ and state for parameters that have none yet."""
        structure, limit = self.settings["structure"], self.settings["max_factor_size"]
        fresh = [b for prefix, root in self._roots for b in build_blocks(root, params, structure, limit, prefix)]
        for block in fresh:
            block.allocate(self._capturable)
            if self.settings["init"] == "sgd":
                block.structure.start_sgd(self.settings["scale"])
        self.blocks += fresh
        if self._gradients is not None:
            self._gradients.watch(fresh)
        for _, root in self._roots:
            attach(root, self.blocks)
        self._publish()

    def _publish(self) -> None:
        """Let ``self.state`` show the blocks' live tensors, each under the first parameter of its block."""
        for block in self.blocks:
            entry = self.state[block.parts[0].param]
            if block.key:
                entry[block.key] = block.state()
            else:
                entry.pop("product", None)
                entry.update(block.state())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model, those of a layer just unfrozen for one.

        ValueError if they are not the model's.
        """
        validate.group({**self.defaults, **param_group})
        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        validate.membership(self._roots, [p[1] if isinstance(p, tuple) else p for p in given])
        super().add_param_group({**param_group, "params": given})
        group = self.param_groups[-1]
        group.setdefault("base_lr", float(group["lr"]))  # before any schedule
        if self._built:
            self._take_up(group["params"])

    @torch.inference_mode(False)  # in which F v would have no derivatives to come from
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. ``closure`` re-evaluates the model and returns the loss, which is returned.

        A step whose gradient or update is not finite is skipped and counted in ``diagnostics()``: parameters, λ and
        moving averages keep their values. RuntimeError where λ itself is not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            with self._own_arithmetic():
                blocks, gs = self._gather()
                if blocks:
                    self._step(blocks, gs)
        finally:
            if self._gradients is not None:
                self._gradients.clear()
        return loss

    def _own_arithmetic(self) -> ExitStack:
        """The optimizer's own products: at its precision, and out of the user's autocast."""
        precision = self.settings["precision"]
        kernels, operands = kernel_precision(precision), {}
        for block in self.blocks:
            where = block.momentum.device, block.momentum.dtype
            if where not in operands:
                operands[where] = operand_dtype(precision, *where)
            block.structure.precision, block.structure.operands = kernels, operands[where]
        stack = ExitStack()
        kind = self.blocks[0].parts[0].param.device.type
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if precision is not None:
            stack.enter_context(precision_scope(precision))
        return stack

    def _gather(self) -> tuple[list[Block], list[Matrix]]:
        """The blocks with a gradient, and those gradients, negated where their group maximizes."""
        self._assign_groups()
        blocks: list[Block] = []
        seen: list[Block] = []
        for block in self.blocks:
            grads = [p.grad for p in block.params]
            if not block.groups or all(g is None for g in grads):
                continue
            block.check_placement()
            block.grads = [
                None if g is None else part.of(g if g.layout is torch.strided else g.to_dense())
                for part, g in zip(block.parts, grads, strict=True)
            ]
            signs = [group["maximize"] for group in block.groups]
            if any(signs):
                block.grads = [-g if sign and g is not None else g for g, sign in zip(block.grads, signs, strict=True)]
            elif self._gradients is not None:
                seen.append(block)
            blocks.append(block)
        thin = {} if self._gradients is None else dict(zip(map(id, seen), self._gradients.thin(seen), strict=True))
        return blocks, [thin.get(id(block)) or Split(block) for block in blocks]

    def _assign_groups(self) -> None:
        """Tell the blocks their parameters' groups: none where one was taken out."""
        grouped = [[id(group), *map(id, group["params"])] for group in self.param_groups]
        if grouped != self._grouped:
            self._grouped = grouped
            group_of = {id(p): group for group in self.param_groups for p in group["params"]}
            for block in self.blocks:
                taken = all(id(p) in group_of for p in block.params)
                block.groups = [group_of[id(p)] for p in block.params] if taken else []
        for block in self.blocks:
            if any(group is not block.groups[0] and group["beta"] != block.beta for group in block.groups[1:]):
                raise ValueError(
                    f"beta should be one for all parameters of {block.name!r}, but its groups differ in it"
                )

    def _uses(self, blocks: list[Block], gs: list[Matrix], updating: bool = False) -> list[tuple[int, int]] | None:
        """How much P and S of each block will be used: in an update of λ, or else in steps until λ changes.

        None: λ does not change.
        """
        s = self.settings
        if updating:
            us = gs if s["u_sampling"] == "gradient" else [b.momentum for b in blocks]  # dense, of that shape
            return [vectors(u, 2, int(s["precondition_aux"])) for u in us]
        periods = [max(every, 1) for every in (s["update_aux_every"], s["anchor_every"]) if every]
        # As if all were dense: whatever the batch, so that a resumed run decides as the first one did.
        times = min(periods, default=0)
        return [(times * n, times * m) for m, n in (b.shape for b in blocks)] if times else None

    def _step(self, blocks: list[Block], gs: list[Matrix]) -> None:
        s, aux = self.settings, self._aux
        norm = self._norm(blocks, gs)
        self._last["grad_norm"] = norm
        if not self._capturable and not torch.isfinite(norm):
            self._skip("skipped_steps", "the gradient is not finite")
            return
        count = self._counts["steps"]
        moved = self._anchor(self.blocks, count)
        every = s["update_aux_every"]
        updates = -every if every < 0 else int(every > 0 and count % every == 0)
        for _ in range(updates):
            self._ops.refresh(blocks, self._uses(blocks, gs, updating=moved))
            self._note_aux(*aux.update(blocks, gs, self._capturable))
            moved = True
        self._ops.refresh(blocks, self._uses(blocks, gs))
        norms, ok = self._ops.theta_step(
            blocks, gs, momentum=s["momentum"], nesterov=s["nesterov"], normalize=s["normalize"], kappa=s["kappa"],
            capturable=self._capturable,
        )  # fmt: skip
        self._counts["steps"] += 1
        self._last["nat_norm"] = ([b.name for b in blocks], norms)
        if self._capturable:
            self._counts["skipped_steps"] = self._counts["skipped_steps"] + ~ok
        elif not ok:
            self._refuse_bad_aux()
            self._skip("skipped_steps", "the natural gradient is not finite")
        if s["writer"] is not None and updates:
            self._write()

    def _norm(self, blocks: list[Block], gs: list[Matrix]) -> Tensor:
        """‖g‖ over all blocks together."""
        squares = [g.square if isinstance(g, Thin) else None for g in gs]
        rest = [b for b, square in zip(blocks, squares, strict=True) if square is None]
        pieces = [g for b in rest for g in b.grads if g is not None]
        known = sum(square for square in squares if square is not None)
        return ((self._ops.inner(pieces, pieces) if pieces else torch.zeros(())) + known).sqrt()

    def _anchor(self, blocks: list[Block], step: int) -> bool:
        """Anchor the blocks that are due; whether any was."""
        due = [b for b in blocks if self._aux.anchor_due(b, step)]
        if due:
            self._aux.anchor(due)
            self._counts["anchors"] += 1
        return bool(due)

    def _note_aux(self, loss: Tensor, ok: Tensor) -> None:
        """Count an update of λ and whether it was taken. RuntimeError where λ had been spoilt before."""
        self._counts["aux_steps"] += 1
        self._last["aux_loss"] = loss
        if self._capturable:
            self._counts["skipped_aux_steps"] = self._counts["skipped_aux_steps"] + ~ok
        elif not ok:
            self._refuse_bad_aux()
            self._counts["skipped_aux_steps"] += 1

    @torch.inference_mode(False)
    @torch.no_grad()
    def pretrain_aux(self, steps: int) -> list[float]:
        """``steps`` updates of λ without moving the parameters; returns the auxiliary losses.

        u is a fresh gradient on labels drawn from the model each time (or Gaussian, as ``u_sampling`` says).
        """
        validate.count("steps", steps)
        blocks = [b for b in self.blocks if any(part.param.requires_grad for part in b.parts)]
        losses = []
        with self._own_arithmetic():
            self._anchor(blocks, 0)
            for _ in range(steps):
                self._note_aux(*self._aux.update(blocks, self._aux.drawn_gradients(blocks), self._capturable))
                losses.append(float(self._last["aux_loss"]))
        return losses

    def diagnostics(self) -> dict[str, Any]:
        """The latest step in numbers (synchronises with the device).

        steps, aux_steps, anchors: how many so far; skipped_steps, skipped_aux_steps: those that were not finite;
        aux_loss: 𝒜 at the latest update of λ; grad_norm: ‖g‖ over all blocks; nat_norm: ‖Q m‖ of each block, by name.
        aux_loss and grad_norm are None until there is one.
        """
        names, norms = self._last.get("nat_norm", ([], torch.zeros(0)))
        scalars = {key: float(self._last[key]) if key in self._last else None for key in ("aux_loss", "grad_norm")}
        return {
            **{k: int(v) for k, v in self._counts.items()},
            **scalars,
            "nat_norm": dict(zip(names, norms.tolist(), strict=True)),
        }

    def _write(self) -> None:
        step = self._counts["steps"]
        for key, value in self.diagnostics().items():
            items = {f"{key}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
            for name, number in items.items():
                if number is not None:
                    self.settings["writer"].add_scalar(f"fishleg/{name}", number, step)

    def _skip(self, counter: str, reason: str) -> None:
        if not self._counts[counter]:
            warnings.warn(
                f"FishLeg skipped a step: {reason}. diagnostics() counts such steps from here on", stacklevel=4
            )
        self._counts[counter] += 1

    def _refuse_bad_aux(self) -> None:
        for block in self.blocks:
            for name, t in block.structure.fishleg_aux.items():
                if not torch.isfinite(t).all():
                    raise RuntimeError(
                        f"λ of {block.name!r}, fishleg_aux[{name!r}], is not finite; load a checkpoint or make "
                        f"the optimizer anew"
                    )

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("FishLeg cannot be copied or pickled, since it is bound to its model; use state_dict()")

    def state_dict(self) -> dict[str, Any]:
        """As any torch optimizer's, λ and its Adam moments included; "fishleg" holds counters and generators.

        Loading it into an optimizer of the same model and structure resumes bit for bit.
        """
        self._publish()
        state = super().state_dict()
        counts = {k: int(v) for k, v in self._counts.items()}
        loader = None if self._passes.loader is None else self._passes.loader.state()
        state["fishleg"] = {"counts": counts, "generator": self._passes.generator.get_state(), "aux_loader": loader}
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume. ValueError where the state is another optimizer's, or of other blocks; nothing is changed then."""
        restored = checkpoint.match(self.blocks, self.param_groups, state_dict)
        super().load_state_dict(state_dict)  # groups; it would also cast λ to the parameters' dtype
        checkpoint.restore(self.blocks, restored)
        self.state.clear()
        self._publish()
        extra = state_dict["fishleg"]
        self._counts.update(extra["counts"])
        self._passes.generator.set_state(extra["generator"].cpu())
        if self._passes.loader is not None and extra["aux_loader"] is not None:
            self._passes.loader.load(extra["aux_loader"])
