"""A gradient is low-rank only while ``.grad`` is exactly EᵀH: ways of making it otherwise, and what hooks leave."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from support.dense import randn
from support.gradient_tap import LIKELIHOOD, LOW_RANK, Training, Way, check, take_step, two_layers, usual


def on_grads(change: Callable[[nn.Parameter], Any]) -> Way:
    """The usual gradients, then changed one by one."""
    return lambda t: (usual(t), [change(p) for p in t.net.parameters()])


def unscale(t: Training) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(t.loss()).backward()
    scaler.unscale_(t.optimizer)


def retain_graph(t: Training) -> None:
    loss = t.loss()
    loss.backward(retain_graph=True)
    loss.backward()


def by_autograd_grad(t: Training, *weights: float) -> None:
    parts = [torch.autograd.grad(c * t.loss(k), tuple(t.net.parameters())) for k, c in enumerate(weights)]
    for p, *grads in zip(t.net.parameters(), *parts, strict=True):
        p.grad = torch.stack(grads).sum(0)


def gradient_penalty(t: Training, weight: float) -> None:
    x, y = t.data()
    outputs = t.net(x.requires_grad_())
    (slope,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
    (LIKELIHOOD.nll(y, outputs) + weight * slope.square().sum()).backward()


def l2(t: Training, weight: float) -> None:
    """The penalty is the older part of the graph, so that autograd comes to it last."""
    penalty = weight * sum(p.square().sum() for p in t.net.parameters())
    (t.loss() + penalty).backward()


def functional_call_after(t: Training) -> None:
    """Another backward pass through the layers, which leaves nothing in .grad."""
    usual(t)
    copies = {name: p.detach().clone().requires_grad_() for name, p in t.net.named_parameters()}
    functional_call(t.net, copies, t.data(1)[0]).sum().backward()


CHANGED: dict[str, Way] = {
    "accumulation": lambda t: (usual(t), t.loss(1).backward()),
    "zero_grad(set_to_none=False)": lambda t: (usual(t), t.optimizer.zero_grad(False), t.loss(1).backward()),
    "clip_grad_norm_": lambda t: (usual(t), clip_grad_norm_(t.net.parameters(), 1e-2)),
    "clip_grad_value_": lambda t: (usual(t), clip_grad_value_(t.net.parameters(), 1e-3)),
    "mul_": on_grads(lambda p: p.grad.mul_(2)),
    "mul_ by nearly one": on_grads(lambda p: p.grad.mul_(1 - 2**-52)),  # only the version tells
    "data.mul_": on_grads(lambda p: p.grad.data.mul_(2)),
    "data.mul_ of the weights": on_grads(lambda p: p.ndim < 2 or p.grad.data.mul_(2)),
    "data.mul_ of the biases": on_grads(lambda p: p.ndim > 1 or p.grad.data.mul_(2)),
    "another tensor": on_grads(lambda p: setattr(p, "grad", 3 * p.grad)),
    "GradScaler.unscale_": unscale,
    "retain_graph": retain_graph,
    "gradient penalty": lambda t: gradient_penalty(t, 1.0),
    "L2 in the loss": lambda t: l2(t, 1.0),
    "functional_call after": functional_call_after,
    # small changes are changes too
    "small: gradient penalty": lambda t: gradient_penalty(t, 1e-4),
    "small: L2 in the loss": lambda t: l2(t, 1e-4),
    "small: L2 by hand": on_grads(lambda p: p.grad.data.add_(p.data, alpha=1e-4)),
    "small: data.mul_": on_grads(lambda p: p.grad.data.mul_(0.999)),
    "small: one row masked": on_grads(lambda p: p.grad.data[p.grad.norm(dim=-1).argmin()].zero_()),
    "small: sum of two": lambda t: by_autograd_grad(t, 1e-3, 1.0),
}


@pytest.mark.parametrize("name", CHANGED)
def test_changed_gradients_are_taken_as_they_are(name: str) -> None:
    check(CHANGED[name], [False, False])


@pytest.mark.parametrize("wrapped", [False, True])
def test_gradients_averaged_over_processes(wrapped: bool, tmp_path: Path) -> None:
    """One process alone: what others would add is written by hand, past autograd, as gloo does."""

    def average(p: nn.Parameter) -> None:
        torch.distributed.all_reduce(p.grad)
        p.grad.data.add_(randn(*p.shape, seed=1)).div_(2)

    def build() -> nn.Module:
        net = nn.parallel.DistributedDataParallel(two_layers().double())
        works = lambda bucket: torch.distributed.all_reduce(bucket.buffer().mul_(2), async_op=True)
        net.register_comm_hook(None, lambda _, bucket: works(bucket).get_future().then(lambda f: f.value()[0]))
        return net

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        check(usual if wrapped else on_grads(average), [False, False], build if wrapped else two_layers)
    finally:
        torch.distributed.destroy_process_group()


def evaluation_between(t: Training) -> None:
    usual(t)
    t.net.eval()
    with torch.no_grad():
        t.loss(1)
    t.net.train()
    t.loss(2)  # a pass without its backward


UNCHANGED: dict[str, Way] = {
    "backward, zero_grad, backward": lambda t: (t.loss(1).backward(), t.optimizer.zero_grad(), usual(t)),
    "saliency first": lambda t: (torch.autograd.grad(t.net(x := t.data(1)[0].requires_grad_()).sum(), x), usual(t)),
    "evaluation between": evaluation_between,
    "torch.func between": lambda t: (usual(t), vmap(t.net)(t.data(1)[0]), jacrev(t.net)(t.data(1)[0][0])),
    "pretraining between": lambda t: (usual(t), t.optimizer.pretrain_aux(1)),
    "torch.autograd.grad": lambda t: by_autograd_grad(t, 1.0),
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_gradients_that_are_low_rank_all_the_same(name: str) -> None:
    check(UNCHANGED[name], LOW_RANK)


@pytest.mark.parametrize("loader", [False, True])
def test_torch_func_grad_over_the_models_own_parameters(loader: bool) -> None:
    """Its gradients are put where an optimizer looks for them, at every second step."""

    def way(t: Training) -> None:
        x, y = t.data()
        params = {name: p.detach() for name, p in t.net.named_parameters()}
        grads = torch.func.grad(lambda ps: LIKELIHOOD.nll(y, functional_call(t.net, ps, (x,))))(params)
        t.net(x)
        for name, p in t.net.named_parameters():
            p.grad = None if t.step % 2 else grads[name]
        if t.step % 2:
            usual(t)
            assert t.optimizer._gradients is None or t.said() == LOW_RANK

    check(way, None, aux_loader=[(randn(5, 20),)] if loader else None)


def test_other_dtypes_than_lambdas_are_dense() -> None:
    check(usual, [False, False], dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        check(usual, [False, False], dtype=torch.float32)


def test_closure_and_tracing() -> None:
    t = Training(two_layers())
    t.optimizer.step(lambda: usual(t))
    assert t.used() == LOW_RANK
    assert torch.equal(torch.jit.trace(t.net, t.data()[0])(t.data()[0]), t.net(t.data()[0]))


def test_nothing_is_kept_after_a_step_nor_of_a_batch_that_is_too_large() -> None:
    t = Training(two_layers(), update_aux_every=0, anchor_every=0)
    taps = t.optimizer._gradients._taps.values()
    for t.step, (t.batch, kept, spoilt) in enumerate([(3, True, False), (30, False, False), (3, True, True)]):
        t.optimizer.zero_grad()
        usual(t)
        assert [bool(tap.seen) for tap in taps] == [kept, kept]
        assert bool(t.net[0](t.data()[0])._backward_hooks) == kept
        references = [weakref.ref(x) for tap in taps for pair in tap.seen for x in pair]
        if spoilt:  # nor after a step that raises
            t.optimizer.blocks[1].structure.fishleg_aux["R"].fill_(float("nan"))
            with pytest.raises(RuntimeError, match="is not finite"):
                t.optimizer.step()
        else:
            t.optimizer.step()
        assert not any(tap.seen for tap in taps) and all(reference() is None for reference in references)
    usual(t)  # nor of gradients that add up
    assert not any(tap.seen for tap in taps)


def hooks(net: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in net.modules())


def test_hooks_are_for_thin_gradients_only_and_go_with_the_optimizer() -> None:
    net = two_layers()
    for options in ({"low_rank": False}, {"capturable": True}, {"structure": "diagonal"}):
        take_step(t := Training(net, **options))
        assert hooks(net) == 0
    t = Training(net)
    take_step(t)
    assert hooks(net) == 2
    del t
    gc.collect()
    assert hooks(net) == 0


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_the_model_have_no_part_in_it(how: str) -> None:
    states, blocks = [], []
    for disturbed in (True, False):
        torch.manual_seed(0)
        t = Training(two_layers())
        blocks += map(weakref.ref, t.optimizer.blocks)
        for t.step in range(3):
            t.optimizer.zero_grad()
            usual(t)
            if disturbed:
                torch.save(t.net, buffer := io.BytesIO())
                buffer.seek(0)
                other = copy.deepcopy(t.net) if how == "deepcopy" else torch.load(buffer, weights_only=False)
                other(t.data()[0]).sum().backward()
                take_step(other := Training(other))
                assert other.used() == LOW_RANK
            assert t.said() == LOW_RANK
            t.optimizer.step()
        states.append(t.state())
    assert torch.equal(*states) and b"LayerTap" not in buffer.getvalue()
    del t
    gc.collect()
    assert not any(block() for block in blocks)  # the copy does not keep them
