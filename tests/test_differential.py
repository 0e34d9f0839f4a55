"""Training beside a FishLeg that moves nothing (lr = 0) is training without it, bit for bit, in all that is the user's.

Another optimizer trains; FishLeg anchors and learns λ all the while.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from fishleg_fast import FishLeg
from support.varied_models import CASES, Case

STEPS = 20


def everything(case: Case) -> dict[str, Any]:
    """What the user owns after a step, copied."""
    modules = {"model": case.model, **{f"other {k}": m for k, m in enumerate(case.others)}}
    found: dict[str, Any] = {"python's generator": random.getstate(), "torch's": torch.get_rng_state()}
    for where, module in modules.items():
        for name, p in module.named_parameters(remove_duplicate=False):
            found[f"{where} {name}"] = p.detach().clone()
            found[f"{where} {name}.grad"] = None if p.grad is None else p.grad.clone()
        found |= {f"{where} {name}": b.clone() for name, b in module.named_buffers()}
        found[f"{where} modes"] = [m.training for m in module.modules()]
    found["owned"] = copy.deepcopy(case.owned())
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def trained(name: str, beside: bool, **options: Any) -> tuple[list[dict[str, Any]], FishLeg | None]:
    random.seed(0)
    torch.manual_seed(0)
    case = CASES[name]()
    params = [p for p in case.model.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(params, lr=0.01, momentum=0.9)
    fishleg = None
    if beside:
        before = torch.get_rng_state(), random.getstate()
        fishleg = FishLeg(case.model, lr=0.0, update_aux_every=3, anchor_every=5, **case.arguments, **options)
        assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    history = []
    for step in range(STEPS):
        sgd.zero_grad()
        loss = case.loss(step)
        loss.backward()
        sgd.step()
        if fishleg is not None:
            fishleg.step()
        history.append({"loss": loss.detach().clone(), **everything(case)})
    return history, fishleg


@pytest.mark.filterwarnings("ignore::UserWarning")  # some models lack forward derivatives, which is told
@pytest.mark.parametrize("fisher", [None, "rank1"])
@pytest.mark.parametrize("name", CASES)
def test_nothing_of_the_users_is_changed(name: str, fisher: str | None) -> None:
    alone, _ = trained(name, beside=False)
    beside, optimizer = trained(name, beside=True, fisher=fisher)
    for step, (want, got) in enumerate(zip(alone, beside, strict=True)):
        changed = [key for key in want if not same(want[key], got[key])]
        assert not changed, (step, changed)
    assert optimizer is not None
    told = optimizer.diagnostics()
    assert told["steps"] == STEPS and told["aux_steps"] == 7 and not told["skipped_steps"]
    assert told["anchors"] == 4
    assert any(not torch.equal(a, b) for a, b in zip(alone[0].values(), alone[-1].values(), strict=True)
               if isinstance(a, Tensor) and isinstance(b, Tensor))  # fmt: skip
