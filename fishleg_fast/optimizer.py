"""FishLeg as a torch optimizer: validate, gather, dispatch. The maths is in the backends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import checkpoint
from .algebra.low_rank import LowRank
from .algebra.matrix import Matrix, norm_of, widest
from .backends import registry
from .backends.arithmetic import own_arithmetic
from .capture import WARMUP, WARMUP_OF_SEVERAL, CapturedStep, CudaGraphs, Training, memory_facts
from .diagnostics import Diagnostics
from .distributed.ranks import Ranks
from .fisher import forward_mode
from .fisher.learning import CurvatureLearner, Quality, trained
from .fisher.step_limit import StepLimit
from .likelihoods import Likelihood
from .membership import Membership
from .model.assemble import (
    StructureChoice,
    by_pattern,
    check_patterns,
    normalization_of,
)
from .model.block import Block, is_sharded
from .model.estimate import Estimate, estimate
from .model.gradients import GradientInPlace
from .model.groups import with_beta
from .model.modules import own_structures
from .options import (
    AUX_LR,
    DAMPING,
    Settings,
    check_count,
    check_group,
    check_membership,
    check_sources,
    chosen_parameters,
    default_aux_update,
    default_damping_scale,
    default_update_aux_every,
    only_products,
    told,
)
from .passes.inputs import EmptyBatch
from .passes.isolated import Draw, IsolatedPasses, Nll, unwrapped
from .passes.taps.gradients import GradientTap
from .passes.taps.positions import PositionTap
from .passes.taps.statistics import StatisticsTap
from .precision import own_precision
from .sharded.learning import ShardedLearner
from .sharded.model import ShardedModel, check_settings
from .sharded.sharding import Sharding

_CALLER = 7  # how far above ``step`` its caller is: past the decorators, of torch.optim too


class FishLeg(Optimizer):
    """Natural-gradient descent with a learned inverse Fisher matrix Q(λ) (Garcia, Freddi et al., ICLR 2023).

    Each step: m ← βm + (1−β)g, θ ← θ − lr·(c·Q m̂ + weight_decay·θ). Every ``anchor_every`` steps, before that, Q is
    estimated from Kronecker factors of F, the Fisher matrix; where λ is learned, every ``update_aux_every`` steps there
    is an Adam step of λ on 𝒜(λ) = ½ vᵀ(F+γI)v − uᵀv, with v = Q u, u = g/‖g‖ and F that on a curvature batch.

    What is trained, and on what:
        model: any module. Plain torch layers get a Kronecker-factored Q each, other parameters a diagonal one.
        draw: ``draw(model, x)``: labels sampled from the model. Goes with ``nll``; the likelihood does without both.
        nll: ``nll(model, x, y)``: the mean negative log-likelihood, a scalar. Where that is no mean over samples,
            ``nll.terms(model, x, y)`` says of how many independent terms it is one.
        likelihood: scores the model's outputs. Its own trainable parameters are trained too.
        aux_loader: gives curvature batches, x or (x, ...), and is re-iterable. Without it they are taken from the
            inputs that the model was last given.
        params: parameters or parameter groups, as any torch optimizer takes them; everything trainable if omitted. A
            group may set lr, weight_decay, beta, maximize and normalize. In a group, "momentum" is another name of
            beta, the one by which schedulers cycle it.

    The step:
        lr: step size: a float or a scalar tensor.
        beta: momentum.
        weight_decay: decoupled, as AdamW's.
        momentum: "before" Q, or "after" it as published.
        nesterov: average the gradient into the momentum once more for the step, as Muon and NAdam do.
        normalize: "rms": each block's update gets root-mean-square 0.2, as Muon's users scale it to AdamW's lr;
            "spectral": each block's natural gradient is replaced by its polar factor, times 0.2·√max(m, n);
            "auto": "spectral" if a sample uses at least half of all matrices' entries at several positions (tokens,
            pixels), as in transformers and convolutional nets, else "rms", where gradients are of low rank and cheap;
            a dict of layer-name patterns (fnmatch's) to those three, of which the first match counts, "auto" elsewhere.
            A parameter group may have a "normalize" of its own, which comes before; diagnostics() tells what is used.
            "trust": all get the factor min(1, √(kappa/(lr₀²·mᵀQm))); None: as computed.
        kappa: of "trust".
        step_limit: no step goes beyond so many times the minimum of the loss's quadratic model along it, which a
            forward pass over ``curvature_batch`` samples measures: every step at first, where steps are as long as
            foretold every fourth near the limit and every tenth well within; those between are taken for as long as the
            latest, times what lr has grown. That needs the targets, which are known where the loss is
            ``likelihood.nll``, and by the gradient of any cross entropy of classes or of binary targets. Elsewhere,
            with aux_loader, draw and nll, maximize or capturable, steps are as lr says. None: they always are.
        maximize: ascend.

    λ and its learning:
        structure: "kron", "diagkron", "sumkron", "diagonal", or a callable (m, n, **options) -> Structure such as
            ``functools.partial(SumKron, terms=3)``; or a dict of layer-name patterns (fnmatch's) to those, of which
            the first match counts, "kron" elsewhere.
        max_factor_size: larger Kronecker factors become block-diagonal. "auto": of a block whose smaller side is k
            those above max(1024, 4k), or 8192, and diagonal where that would take more than four parts
            (vocabularies); diagnostics() tells. None: all are dense.
        damping: with damping_scale="relative" δ > 0, of which a block's γ is δ²·√(f·F̄)/T: f is the mean eigenvalue of
            the block's Fisher matrix, F̄ that over all blocks, T how many terms the loss of a batch is the mean of. The
            loss's scale does not matter then, and γ follows the noise in a gradient, whose variance is f/T on average.
            "absolute": γ itself, in units of the Fisher matrix. None: 10, or 0.1 where it is absolute.
        damping_scale: None: "relative", but "absolute" where the Fisher matrix is not estimated (init="sgd",
            anchor_every=0 and aux_update="adam") or Q's own scale counts (normalize "trust" or None).
        fisher: "ggn", exact, needs a likelihood; "hessian", "antithetic" and "rank1" use labels drawn from the model.
            None: "ggn" with a likelihood, "hessian" without. Where an operation of the model lacks a derivative, both
            go on by differences, with a warning.
        curvature_batch: at most so many samples in a Fisher-vector product; "auto": 32, and of a batch trained on a
            quarter, but 4; None: the whole batch. A batch is cut along what provably runs over it, and else stays
            whole.
        aux_update: "adam": an Adam step of λ on 𝒜, as published. "natural": a natural-gradient step of λ on 𝒜 averaged
            over u ~ N(0, Q⁻¹), from a batch's Kronecker factors of F (``fishleg_fast.algebra.natural``); goes with
            anchor_every=0, structure "kron" or "diagonal". None: "natural" where those are so, "adam" elsewhere.
        update_aux_every: steps between updates of λ; negative: that many updates a step; 0: λ is not learned. None: 0
            where anchoring gives all of Q that matters (structure "kron" or "diagonal", each block scaled by itself),
            since learning besides it changes no loss; 10 elsewhere.
        aux_lr, aux_betas, aux_eps: of Adam on λ; of natural-gradient steps aux_lr is the rate η, at most 1, at the k-th
            η/(1−(1−η)ᵏ), so that the first forgets the start. None: 5e-4, or 0.1 of natural-gradient steps.
        u_sampling: u is the "gradient", the "momentum" (the moving average of g) or "gaussian".
        precondition_aux: multiply the auxiliary loss's gradient by Q.
        learn_scale: False: the auxiliary loss is taken at Q's best multiple, so that it teaches Q's shape alone; its
            scale is without effect but under normalize "trust" and None.
        seed: of the labels drawn for the curvature, which leave torch's generators alone.

    The start of Q, and anchoring:
        init: Q₀: "kfac", from the Fisher's Kronecker factors on the first curvature batch, or "sgd", scale·I.
        scale: of "sgd".
        anchor_every: steps between estimates of Q anew from the Kronecker factors; 0: never, FishLeg pure.
        anchor_decay: of the factors' moving average over those estimates, in [0, 1).
        anchor_from: "drawn", with labels drawn from the model, which takes a forward and a backward pass; "training",
            from your own backward pass (forward hooks), with damping_scale="relative".

    Cost and backend:
        backend: None for the best available one; ``python -m fishleg_fast`` tells which there are.
        precision: of the optimizer's own float32 products, "highest", "high" or "medium" as for
            ``torch.set_float32_matmul_precision``, or "tf32x3" (see ``fishleg_fast.precision``); None follows that
            setting, but is "high" (TF32) on CUDA where it is torch's default.
        thin_gradients: watch linear layers' inputs and output gradients (forward hooks), of which their gradients are
            products of low rank: cheaper where the batch is smaller than the layer, and the same but for rounding.
        capturable: decide everything in a step on the device, without synchronisation, as steps are on a GPU in any
            case; and wait for nothing to tell of skipped steps either. ``capture`` makes a CUDA graph of a step. In a
            graph captured otherwise λ rests: capture a step without an update of λ, and take steps outside the graph
            between replays; of those alone, one in update_aux_every learns λ, one in anchor_every anchors it.
        process_group: the ranks over which gradients are averaged, which average the curvature too. None: those of a
            DistributedDataParallel, or of ``fully_shard``'s mesh; without either, this process alone. All ranks make
            the optimizer, and step, together.
        shard_state: have λ and all other state of each block on one of those ranks, as ZeRO does, which sends its
            updates to the others: less memory and arithmetic for more bytes sent (``python -m fishleg_fast --plan``).
            So it is in any case with a model that was given to ``torch.distributed.fsdp.fully_shard``.
        writer: a tensorboard SummaryWriter (anything with add_scalar), given the diagnostics at updates of λ.

    Raises:
        TypeError, ValueError: an argument is wrong.
        RuntimeError: the named backend is unavailable; in ``step``: λ is not finite, or there is no curvature batch.
    """

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
        aux_lr: float | None = None,
        aux_betas: tuple[float, float] = (0.9, 0.999),
        aux_eps: float = 1e-7,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        damping: float | None = None,
        damping_scale: str | None = None,
        aux_update: str | None = None,
        update_aux_every: int | None = None,
        fisher: str | None = None,
        precondition_aux: bool = False,
        learn_scale: bool = True,
        u_sampling: str = "gradient",
        structure: StructureChoice | Mapping[str, StructureChoice] = "kron",
        init: str = "kfac",
        anchor_every: int = 10,
        anchor_decay: float = 0.9,
        anchor_from: str = "drawn",
        scale: float = 1.0,
        momentum: str = "before",
        nesterov: bool = True,
        normalize: str | Mapping[str, str] | None = "auto",
        kappa: float = 1e-3,
        step_limit: float | None = 1.0,
        curvature_batch: int | str | None = "auto",
        max_factor_size: int | str | None = "auto",
        thin_gradients: bool = True,
        precision: str | None = None,
        backend: str | None = None,
        writer: Any = None,
        maximize: bool = False,
        capturable: bool = False,
        seed: int = 0,
        process_group: Any = None,
        shard_state: bool = False,
    ) -> None:
        default_fisher = "hessian" if likelihood is None else "ggn"
        fisher = default_fisher if fisher is None else fisher
        if fisher == "ggn":
            forward_mode.load()
        check_sources(model, draw, nll, likelihood, aux_loader, fisher)
        products = only_products(structure, own_structures(model))
        if aux_update is None:
            aux_update = default_aux_update(products, anchor_every, update_aux_every)
        aux_lr = AUX_LR.get(aux_update, 1.0) if aux_lr is None else aux_lr
        if update_aux_every is None:
            update_aux_every = default_update_aux_every(products, normalize, anchor_every)
        damping_scale = damping_scale or default_damping_scale(normalize, init, anchor_every, aux_update)
        damping = DAMPING.get(damping_scale, 1.0) if damping is None else damping
        on_device = capturable or any(p.device.type != "cpu" for p in model.parameters())
        self.settings = Settings(
            momentum=momentum, nesterov=nesterov, normalize=normalize, kappa=kappa, step_limit=step_limit,
            capturable=capturable, on_device=on_device,
            structure=structure, products=products, max_factor_size=max_factor_size,
            damping=damping, damping_scale=damping_scale,
            fisher=fisher, curvature_batch=curvature_batch, aux_update=aux_update, update_aux_every=update_aux_every,
            aux_lr=aux_lr, aux_betas=aux_betas, aux_eps=aux_eps, u_sampling=u_sampling,
            precondition_aux=precondition_aux, learn_scale=learn_scale,
            init=init, scale=scale, anchor_every=anchor_every, anchor_decay=anchor_decay,
            anchor_from=anchor_from,
            precision=precision, writer=writer, seed=seed,
        )  # fmt: skip
        self.model, self.likelihood = model, likelihood
        roots = [("", unwrapped(model))]  # whose layers have the user's names
        if likelihood is not None and all(module is not likelihood for module in model.modules()):
            roots.append(("likelihood.", likelihood))
        self._sharding = Sharding.of(model, model.parameters())
        if self._sharding is not None and process_group is not None:
            raise ValueError("process_group should be None with fully_shard, whose mesh tells, but is one")
        self._ranks = Ranks.of(model, process_group if self._sharding is None else self._sharding.group)
        if self._sharding is None:
            self._ranks.check_equal({"shard_state=": bool(shard_state)})  # which decides what else they say
        if shard_state and self._sharding is None and self._ranks.several:
            self._sharding = Sharding(unwrapped(model), self._ranks.group)
        if self._sharding is not None:
            check_settings(self.settings)
        # Whether a gradient is of low rank is decided on the host; the average of several ranks' is not.
        watched = thin_gradients and not on_device and not self._ranks.several
        self._gradients = GradientTap(self) if watched else None
        self._statistics = StatisticsTap(self) if anchor_from == "training" else None
        self._positions, self._auto = PositionTap(self), "rms"
        self._members = Membership(roots, self.settings, self._sharding, self._taps, self._positions)
        self._built = False
        defaults = dict(lr=lr, weight_decay=weight_decay, beta=beta, momentum=beta, maximize=maximize)
        super().__init__(chosen_parameters(roots, params), defaults)
        everything = [p for group in self.param_groups for p in group["params"]]
        if not everything:
            raise ValueError(
                "model should have a trainable parameter but has none (does everything have requires_grad=False?)"
            )
        self._follow_parameters()
        self._built = True
        for argument in ("structure", "normalize"):
            check_patterns(argument, getattr(self.settings, argument), self._layouts)
        where = everything[0].device, everything[0].dtype
        self._precision = own_precision(precision, where[0])
        dtypes = dict.fromkeys(p.dtype for p in everything if p.device == where[0])
        self.backend, self._ops = registry.choose(backend, *where, self._precision, dtypes)
        whole = curvature_batch is None
        rank = self._ranks.rank
        self._passes = IsolatedPasses(model, draw, nll, likelihood, aux_loader, seed, self, self._taps, not whole, rank)
        self._given = self._passes, self.settings.curvature, self._ops, self._ranks
        self._learner: CurvatureLearner = (
            CurvatureLearner(*self._given) if self._sharded is None else ShardedLearner(*self._given, self._sharded)
        )
        self._limit: StepLimit | None = None
        if step_limit is not None and likelihood is not None and not capturable:
            self._limit = StepLimit(self._passes, self._ranks, step_limit, curvature_batch)
        if self._ranks.several:
            self._ranks.check_equal(self._facts())
        self._diagnostics = Diagnostics(on_device, writer, self._ranks.each)
        self._step_supports_amp_scaling = capturable  # GradScaler then does not wait for the device before a step
        self._passes.tell = self._diagnostics.note
        if self._sharding is not None and self._sharding.units:
            self._passes.together(self._sharding.reshard, self._ranks.agreed)
        if self._statistics is not None:
            self._statistics.leaves_out = self._passes.leaves_out
        self._publish_progress()
        self._look_ahead()

    def _facts(self) -> dict[str, Any]:
        """What has to be the same on all ranks, by name."""
        facts: dict[str, Any] = {"the number of blocks": len(self._layouts)}
        for b in self._layouts:
            facts[f"block {b.name}"] = tuple(b.shape), type(b.structure).__name__, b.structure.layout()
            whole = [p for p in b.params if not is_sharded(p)]
            squares = [float(p.detach().to(widest(p.device)).square().sum()) for p in whole]
            facts[f"the size of the parameters of {b.name}"] = squares
        settings = {f.name: getattr(self.settings, f.name) for f in fields(self.settings)}
        facts |= {f"{name}=": told(value) for name, value in settings.items() if name != "writer"}
        numbers = ("lr", "beta", "weight_decay", "maximize", "normalize")
        facts["the backend"] = self.backend
        facts["the precision of its products"] = self._precision
        facts["torch.get_float32_matmul_precision()"] = torch.get_float32_matmul_precision()
        facts["parameter groups"] = [tuple(str(group.get(n)) for n in numbers) for group in self.param_groups]
        return facts

    @property
    def blocks(self) -> list[Block]:
        """The blocks whose λ is on this rank."""
        return self._members.blocks

    @property
    def _layouts(self) -> list[Block]:
        """All blocks of the model."""
        return self._members.layouts

    @property
    def _sharded(self) -> ShardedModel | None:
        return self._members.sharded

    @property
    def _taps(self) -> list[GradientTap | StatisticsTap]:
        return [tap for tap in (self._gradients, self._statistics) if tap is not None]

    def _look_ahead(self) -> None:
        """See what the next step will need of the user's passes."""
        if self._statistics is not None:
            self._statistics.open = bool(self._learner.anchor_due(self.blocks, self._diagnostics.steps))
        if self._limit is not None:
            self._limit.look_ahead(self._diagnostics.steps, self._lr())

    def _follow_parameters(self, settled: bool = True) -> None:
        """Have blocks for the groups' parameters (``membership``)."""
        before = self._sharded
        self._members.follow(self, settled)
        if self._built and self._sharded is not None and self._sharded is not before:
            self._learner = ShardedLearner(*self._given, self._sharded)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model, those of a layer just unfrozen for one.

        ValueError if they are not the model's.
        """
        param_group = with_beta(param_group)
        check_group({**self.defaults, **param_group})
        if param_group.get("normalize") and not self.settings.by_block:
            raise ValueError(
                "normalize of a group goes with 'auto', 'rms' or 'spectral' for the optimizer's, but that is: "
                f"{self.settings.normalize!r}"
            )
        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        plain = [p[1] if isinstance(p, tuple) else p for p in given]
        check_membership(self._members.roots, plain, may_be_sharded=self._sharding is not None)
        super().add_param_group({**param_group, "params": given})
        group = self.param_groups[-1]
        group.setdefault("base_lr", float(group["lr"]))  # before any schedule
        if self._built:
            self._follow_parameters(settled=False)
            self._look_ahead()

    @staticmethod
    def estimate(
        model: nn.Module,
        structure: StructureChoice | Mapping[str, StructureChoice] = "kron",
        max_factor_size: int | str | None = "auto",
    ) -> Estimate:
        """What FishLeg would take for this model, before anything is allocated: memory of λ in bytes, arithmetic in
        floating-point operations, by block and in all. ``print`` it for a table.

        The model may be on torch's "meta" device. Blocks as of an optimizer with those arguments; its passes through
        the model, which take what the user's own take, are not in it.
        """
        return estimate(model, structure, max_factor_size)

    @torch._disable_dynamo  # torch.compile(optimizer.step) is the step itself, as if it were not compiled
    @torch.inference_mode(False)  # in which F v would have no derivatives to come from
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. ``closure`` re-evaluates the model and returns the loss, which is returned.

        A step whose gradient or update is not finite is skipped and counted in ``diagnostics()``: parameters, λ and
        moving averages keep their values. RuntimeError where λ itself is not finite.

        Parameters that were replaced in the model and in their group are taken up, with a fresh λ, and those whose
        ``state`` was let go of start anew. ValueError where a group has one that is not the model's.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._ranks.check_step()
        if self._sharding is not None:
            self._sharding.reshard()
        try:
            if self._sharded is not None:
                self._follow_parameters()
            elif self._members.unfollowed(self) or self._members.left(every=self._learns_now()):
                self._follow_parameters()
            self._members.groups.check(self.param_groups)
            self._ranks.average_others(p for group in self.param_groups for p in group["params"])
            if self._sharded is not None:
                self._ranks.average(self._sharded.others())
            self._unscale()
            with own_arithmetic(self.blocks, self._precision):
                blocks, gs = self._gather()
                if blocks or self._sharded is not None:
                    self._step(blocks, gs)
        finally:
            for tap in self._taps:
                tap.clear()
            for block in self.blocks:
                block.grads = []  # whose memory is the user's to free
            self._look_ahead()
        self._diagnostics.warn(_CALLER)
        return loss

    def _unscale(self) -> None:
        """Divide the gradients by GradScaler's scale, which it leaves to optimizers that need not wait for its checks:
        those that have ``_step_supports_amp_scaling``. What is not finite is found as ever.
        """
        scale: Tensor | None = getattr(self, "grad_scale", None)
        if scale is None:
            return
        by_device: dict[torch.device, list[Tensor]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    by_device.setdefault(p.grad.device, []).append(p.grad)
        for device, grads in by_device.items():
            torch._foreach_mul_(grads, scale.to(widest(scale.device)).reciprocal().to(device, torch.float32))

    def capture(self, step: Callable[[], Any], warmup: int | None = None) -> CapturedStep:
        """``step`` as a CUDA graph, with λ learned: a function that takes a step at each call.

        ``step()`` takes one training step: forward and backward pass and ``optimizer.step()``, on inputs that are in
        the same tensors each time (copy the next batch to them before each call), without reading a value from the
        device. What it returns is returned; of replayed steps it is overwritten by the next.

        The first steps, and those with an update of λ or anchoring, run as they are, on a stream of their own; the
        others are replays of one graph, which is captured again where parameters, the model's mode or a group's numbers
        have changed. An lr that is a scalar tensor on the device may change: schedulers write to it, outside of
        ``step``. A GradScaler belongs into ``step``, with ``capturable=True``.

        ``warmup``: steps before the first capture; None: 3, or 11 with DistributedDataParallel, as torch asks for.

        ValueError without a CUDA device or ``capturable=True``; RuntimeError, in a step, where it cannot be captured.
        """
        if not self.settings.capturable:
            raise ValueError("capture needs capturable=True, but the optimizer was made with: False")
        device = self.blocks[0].momentum.device
        if device.type != "cuda":
            raise ValueError(f"capture needs a model on a CUDA device, but it is on: {device}")
        for group in self.param_groups:
            if isinstance(lr := group["lr"], Tensor) and lr.device != device:
                raise ValueError(f"lr should be a float or a tensor on {device} to be captured but is on: {lr.device}")
        if warmup is None:
            warmup = WARMUP_OF_SEVERAL if self._ranks.several else WARMUP
        check_count("warmup", warmup, least=1)
        return CapturedStep(self._training, step, CudaGraphs(device), warmup)

    @property
    def _training(self) -> Training:
        def refresh() -> None:
            with torch.inference_mode(False), torch.no_grad(), own_arithmetic(self.blocks, self._precision):
                self._ops.refresh(self.blocks, self._learner.applications_in_steps(self.blocks))

        def facts() -> dict[str, Any]:
            self._members.groups.check(self.param_groups)  # a scheduler's "momentum" is beta
            return memory_facts(self.model, self.blocks)

        return Training(self, self._diagnostics, self._ordinary, facts, refresh, self._look_ahead)

    def _ordinary(self) -> bool:
        """Whether the next step neither learns nor anchors λ, and its parameters are those of the one before."""
        learner, count = self._learner, self._diagnostics.steps
        due = learner.updates_due(count) or learner.anchor_due(self.blocks, count)
        return not due and not self._members.unfollowed(self)

    def _learns_now(self) -> bool:
        """Whether the next step updates λ: parameters that the model may have lost are worth the time then."""
        return bool(self._learner.updates_due(self._diagnostics.steps))

    def _gather(self) -> tuple[list[Block], list[Matrix]]:
        """The blocks with a gradient, and those gradients, negated where their group maximizes."""
        if self._positions.news:
            self._auto, self._positions.news = normalization_of(self._layouts), False
        if self._sharded is not None:
            stepped = self._sharded.gather()
            for block in stepped:
                block.spectral = self._normalization(block) == "spectral"
            return stepped, [GradientInPlace(block) for block in stepped]
        blocks: list[Block] = []
        seen: list[Block] = []
        for block in self.blocks:
            grads = [p.grad for p in block.params]
            if all(g is None for g in grads):
                continue
            block.check_placement()
            block.spectral = self._normalization(block) == "spectral"
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
        low_rank = (
            {} if self._gradients is None else dict(zip(map(id, seen), self._gradients.low_rank(seen), strict=True))
        )
        return blocks, [low_rank.get(id(block)) or GradientInPlace(block) for block in blocks]

    def _step(self, blocks: list[Block], gs: list[Matrix]) -> None:
        learner, count = self._learner, self._diagnostics.steps
        norm = self._norm(blocks, gs)
        self._diagnostics.note_gradient(norm)
        if self._ranks.several and (learner.updates_due(count) or learner.anchor_due(self.blocks, count)):
            alike = [p.detach() for b in self._layouts for p in b.params if not is_sharded(p)]
            local = norm if self._sharded is None else self._sharded.local_norm()
            self._ranks.check_average(local, norm_of(alike, norm.device))
        if (self._sharded is not None or not self.settings.on_device) and not torch.isfinite(norm):
            self._diagnostics.skip_step("the gradient is not finite")
            return
        if self._teaches(norm):
            learned = self._learn(blocks, gs, count)
        else:
            learned = False
            learner.postpone(count)
        self._ops.refresh(blocks, learner.applications_in_steps(blocks))
        norms, ok = self._move(blocks, gs, count)
        self._diagnostics.note_step(self.blocks, blocks, norms, ok)
        if learned:
            self._diagnostics.write()

    def _move(self, blocks: list[Block], gs: list[Matrix], count: int) -> tuple[Tensor, Tensor]:
        """The θ step, no farther than ``step_limit``; ‖Q m̂‖ of each block, and whether it was taken."""
        theta = self.settings.theta
        if theta.normalize == "spectral" and not any(block.flattened for block in blocks):
            theta = replace(theta, normalize="rms")
        move = partial(self._ops.theta_step, blocks, gs, theta)
        ascent = any(group["maximize"] for group in self.param_groups)  # of which the model has no minimum
        limit = None if ascent else self._limit
        factor = None if limit is None else limit.scale(count, self._lr())
        if isinstance(self._learner, ShardedLearner) and self._sharded is not None:
            line = self._learner.line
            measured = None if factor is None else lambda moves: factor(partial(line, moves))
            return self._sharded.step(self._ops, blocks, gs, theta, measured)
        return move() if limit is None or factor is None else limit.around(factor, [*trained(blocks).values()], move)

    def _lr(self) -> float:
        """The greatest of the groups', of those that the host knows."""
        lrs = [group["lr"] for group in self.param_groups]
        return max((float(lr) for lr in lrs if not isinstance(lr, Tensor) or lr.device.type == "cpu"), default=1.0)

    def _teaches(self, norm: Tensor) -> bool:
        """Whether a step with a gradient of this norm tells of the curvature: with anchor_from="training" it is where
        that is from.
        """
        return self._statistics is None or self.settings.on_device or bool(norm)

    def _learn(self, blocks: list[Block], gs: list[Matrix], count: int) -> bool:
        """Anchor and update λ where that is due; whether it was updated. An empty batch has nothing to learn from:
        that is then due at the next step.
        """
        learner, learned, moved = self._learner, False, False
        try:
            moved = self._anchor(self.blocks, count, self._statistics)
            learned = moved and self.settings.curvature.natural
            for _ in range(learner.updates_due(count)):
                used = learner.applications_in_update(blocks, gs) if moved else learner.applications_in_steps(blocks)
                self._ops.refresh(blocks, used)
                self._diagnostics.note_update(self.blocks, *learner.update(blocks, gs))
                moved = learned = True
        except EmptyBatch:
            learner.postpone(count)
        else:
            learner.settle()
        if self.settings.on_device and not self.settings.capturable and (learned or moved):
            self._diagnostics.catch_up(self.blocks)
        return learned

    def _normalization(self, block: Block) -> str | None:
        """How the block's update is scaled."""
        chosen = block.groups[0].get("normalize") if block.groups else None
        chosen = chosen or by_pattern(self.settings.normalize, block.name, "auto")
        return self._auto if chosen == "auto" else chosen

    def _norm(self, blocks: list[Block], gs: list[Matrix]) -> Tensor:
        """‖g‖ over all blocks together."""
        squares = [g.square if isinstance(g, LowRank) else None for g in gs]
        rest = [b for b, square in zip(blocks, squares, strict=True) if square is None]
        pieces = [g for b in rest for g in b.grads if g is not None]
        known = sum(square for square in squares if square is not None)
        total = (self._ops.inner(pieces, pieces) if pieces else torch.zeros((), device="cpu")) + known
        return (total if self._sharded is None else self._sharded.total(total)).sqrt()

    def _anchor(self, blocks: list[Block], step: int, tap: StatisticsTap | None = None) -> bool:
        """Anchor the blocks that are due; whether any was."""
        due = self._learner.anchor_due(blocks, step)
        if due:
            self._learner.anchor(self.blocks, due, tap)
            self._diagnostics.note_estimate("aux_steps" if self.settings.curvature.natural else "anchors")
        return bool(due)

    @torch.inference_mode(False)
    @torch.no_grad()
    def pretrain_aux(self, steps: int) -> list[float]:
        """``steps`` of Adam's updates of λ without moving the parameters; returns the auxiliary losses.

        u is a fresh gradient on labels drawn from the model each time (or Gaussian, as ``u_sampling`` says).
        ValueError with aux_update="natural", whose first step is of rate 1: there is nothing to make up for.
        """
        check_count("steps", steps)
        if self.settings.curvature.natural:
            raise ValueError("pretrain_aux goes with aux_update='adam'; natural-gradient steps need no head start")
        self._follow_parameters()
        blocks = [b for b in self.blocks if any(part.param.requires_grad for part in b.parts)]
        for block in blocks:
            block.allocate_adam()
        losses = []
        with own_arithmetic(self.blocks, self._precision):
            self._anchor(blocks, 0)
            for _ in range(steps):
                drawn = self._learner.drawn_gradients(blocks)
                self._diagnostics.note_update(self.blocks, *self._learner.update(blocks, drawn))
                losses.append(self._diagnostics.aux_loss)
        self._diagnostics.warn(4)
        return losses

    def diagnostics(self, quality: bool = False) -> dict[str, Any]:
        """The latest step in numbers (synchronises with the device).

        steps, aux_steps, anchors: how many so far; skipped_steps, skipped_aux_steps: those that were not finite;
        aux_loss: 𝒜 at the latest of Adam's updates of λ; grad_norm: ‖g‖ over all blocks; nat_norm: ‖Q m‖ of each block,
        by name. aux_loss and grad_norm are None until there is one. normalize: how each block's update is scaled;
        factors: how the Kronecker factors of each block are laid out.

        With ``quality`` also how well Q inverts F+γI along one u, which takes a Fisher-vector product on a curvature
        batch, and changes nothing in the training: a ``fisher.learning.Quality``. u is as in updates of λ, of the
        parameters' gradients, or where there are none of gradients on drawn labels. All ranks ask together.
        """
        return {
            **self._diagnostics.report(),
            **({} if self._limit is None else self._limit.report()),
            "normalize": {b.name: self._normalization(b) for b in self._layouts},
            "factors": {b.name: layout for b in self._layouts if (layout := b.structure.layout())},
            **({"quality": self._quality()} if quality else {}),
        }

    @torch.inference_mode(False)
    @torch.no_grad()
    def _quality(self) -> Quality:
        try:
            with self._passes.unnoticed(), own_arithmetic(self.blocks, self._precision):
                blocks, gs = self._gather()
                if not self._ranks.least(-len(blocks)):
                    blocks = [b for b in self.blocks if any(part.param.requires_grad for part in b.parts)]
                    gs = list(self._learner.drawn_gradients(blocks))
                return self._learner.quality(blocks, gs)
        finally:
            for block in self.blocks:
                block.grads = []

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("FishLeg cannot be copied or pickled, since it is bound to its model; use state_dict()")

    def state_dict(self) -> dict[str, Any]:
        """As any torch optimizer's, λ and its Adam moments included; "fishleg" of the first group holds counters.

        Loading it into an optimizer of the same model and structure resumes bit for bit.
        """
        self._follow_parameters()
        self._publish_progress()
        return super().state_dict()

    def _publish_progress(self) -> None:
        """Counters, and where generators and loaders are, in the first group."""
        now = {
            "version": checkpoint.VERSION, **self._diagnostics.counts(), **self._learner.state(self.blocks),
            **self._passes.state(), **({} if self._limit is None else self._limit.state()),
        }  # fmt: skip
        for number, group in enumerate(self.param_groups):
            group.pop("fishleg", None)
            if not number:
                group["fishleg"] = now

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume. ValueError where the state is another optimizer's, or of other blocks; nothing is changed then."""
        self._follow_parameters()
        progress = checkpoint.progress(state_dict)
        restored = checkpoint.match(self.blocks, self.param_groups, state_dict)
        counters = checkpoint.saved_counters(self.param_groups, state_dict)
        super().load_state_dict(state_dict)  # groups; it would also cast λ to the parameters' dtype
        checkpoint.restore(self.blocks, restored)
        if self._sharded is not None:
            self._sharded.load_counters(counters)
        self._members.publish(self)
        self._follow_parameters()
        self._diagnostics.load(progress)
        self._passes.load(progress)
        self._learner.load(progress, self.blocks)
        if self._limit is not None:
            self._limit.load(progress)
        self._publish_progress()
        self._look_ahead()
