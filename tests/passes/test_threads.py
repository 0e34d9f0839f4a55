"""Two optimizers train in two threads as they do alone, and leave the settings of the process as they were."""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fishleg_fast import CategoricalLikelihood, FishLeg
from fishleg_fast.precision import precision_scope


def together(*jobs: Callable[[], object]) -> list[object]:
    """What the jobs return, all at once in threads."""
    results: list[object] = [None] * len(jobs)
    ready = threading.Barrier(len(jobs))

    def run(k: int) -> None:
        ready.wait()
        try:
            results[k] = jobs[k]()
        except BaseException as error:
            results[k] = error

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


class Tossing(nn.Module):
    """Drops its middle layer by Python's and NumPy's generators, in the optimizer's passes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.user = True

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        if self.user or random.random() + np.random.rand() > 0.7:
            h = h + torch.tanh(self.b(h))
        return self.c(h)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def trajectory(make: Callable[[], nn.Module], seed: int, **options: object) -> Callable[[], Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = make()
    likelihood = CategoricalLikelihood()
    optimizer = FishLeg(net, likelihood=likelihood, update_aux_every=1, anchor_every=2, seed=seed, **options)

    def train() -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        states = []
        for _ in range(25):
            x, y = torch.randn(24, 8, generator=generator), torch.randint(4, (24,), generator=generator)
            optimizer.zero_grad()
            net.user = True
            likelihood.nll(y, net(x)).backward()
            net.user = False
            optimizer.step()
            states.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
        assert not optimizer._passes.attempts("ggn", "forward mode").failures
        return torch.stack(states)

    return train


def settings() -> list[object]:
    places = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    found: list[object] = [place.fp32_precision for place in places]
    found += [
        torch.autograd.forward_ad._current_level,
        torch.is_grad_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
    ]
    return [*found, torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())]


@pytest.mark.parametrize("precision", [(None, None), ("high", "highest")])
@pytest.mark.parametrize("fisher", ["ggn", "antithetic"])
@pytest.mark.parametrize("make", [mlp, Tossing])
def test_trajectories_are_those_of_training_alone(make: Callable, fisher: str, precision: tuple) -> None:
    options = [{"fisher": fisher, "precision": p} for p in precision]
    before = settings()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (first,), (second,) = (together(trajectory(make, k, **options[k])) for k in range(2))
        for _ in range(2):
            both = together(trajectory(make, 0, **options[0]), trajectory(make, 1, **options[1]))
            assert torch.equal(both[0], first) and torch.equal(both[1], second)
    assert settings() == before and not torch.equal(first, second)


def test_precision_is_the_user_s_again_in_any_interleaving() -> None:
    before = settings()[:2]
    entered, let_go = threading.Event(), threading.Event()
    seen: list[object] = []

    def long() -> None:
        with precision_scope("high"):
            entered.set()
            let_go.wait(0.2)
            seen.append(settings()[:2])

    def within() -> None:
        entered.wait()
        with precision_scope("highest"):
            let_go.set()
            seen.append(settings()[:2])

    together(long, within)
    assert settings()[:2] == before
    assert seen == [["tf32", "tf32"], ["ieee", "ieee"]]  # each has what it asked for, to its end
