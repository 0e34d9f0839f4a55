"""Several processes that train one model, by torch.distributed: what of λ they have to agree on, and how.

Each process (rank) sees its own part of a batch. Gradients come averaged, from DistributedDataParallel or the user.
Moments and Fisher products are averaged here, in one all-reduce each for all blocks; everything else follows from those
and is computed by every rank alike, so that parameters stay equal bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..passes.inputs import EmptyBatch

BUCKET = 2**24  # numbers that go at a time
Found = TypeVar("Found")
_WRAPPER = nn.parallel.DistributedDataParallel


class Ranks:
    """The processes of a group; without one, this process alone."""

    def __init__(self, group: dist.ProcessGroup | None = None, wrapper: nn.Module | None = None) -> None:
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise ValueError(
                "process_group should be a torch.distributed.ProcessGroup that this process is in, as new_group gives "
                f"its members, or None, but is: {group!r}"
            )
        self.group, self._wrapper = group, wrapper
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        trained = () if wrapper is None else (p for p in wrapper.parameters() if p.requires_grad)
        self._averaged = set(map(id, trained))  # by the wrapper, which knows of those that it was made with

    @staticmethod
    def of(model: nn.Module, group: dist.ProcessGroup | None) -> Ranks:
        """Those of ``group``; for None those that a DistributedDataParallel averages gradients over."""
        wrapper = next((m for m in model.modules() if isinstance(m, _WRAPPER)), None)  # in a wrapper of the user's too
        if wrapper is not None and group is not None and group is not wrapper.process_group:
            raise ValueError(
                "process_group should be None with a DistributedDataParallel, which has one, but is another one"
            )
        return Ranks(group if wrapper is None else wrapper.process_group, wrapper)

    @property
    def several(self) -> bool:
        """Whether there is more than this process."""
        return self.size > 1

    def check_step(self) -> None:
        """RuntimeError where the gradients of this step are not the ranks' average, or some ranks take no step."""
        if self.group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                f"process_group should be given where there are {dist.get_world_size()} ranks and the model is no "
                "DistributedDataParallel, as ranks would learn curvatures of their own and drift apart: make the "
                "optimizer of DistributedDataParallel(net), or pass process_group=torch.distributed.group.WORLD where "
                "you average gradients, or a group of this rank alone where each trains a model of its own"
            )
        if not self.several or self._wrapper is None:
            return
        if not self._wrapper.require_backward_grad_sync:
            raise RuntimeError("step() should come after a backward pass outside of no_sync(), but gradients are local")
        if getattr(getattr(self._wrapper, "_join_config", None), "enable", False):
            raise RuntimeError(
                "join() is not supported: ranks that have run out of batches would take no part in averaging the "
                "curvature. Give every rank as many batches (DistributedSampler with drop_last=True)"
            )

    def average_others(self, params: Iterable[nn.Parameter]) -> None:
        """Average, in place, the gradients that a DistributedDataParallel does not: of a likelihood's parameters, and
        of those that came or were unfrozen later. None counts as zero where another rank has one.
        """
        if not self.several or self._wrapper is None:
            return
        others = [p for p in params if id(p) not in self._averaged]
        found = [p for p, n in zip(others, self.sums([p.grad is not None for p in others]), strict=True) if n]
        for p in found:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self.mean([p.grad for p in found if p.grad is not None])

    def average(self, params: Sequence[nn.Parameter]) -> None:
        """Average the gradients of those that have one, in place; they are the same ones on all ranks."""
        self.mean([p.grad for p in params if p.grad is not None])

    def check_average(self, norm: Tensor, size: Tensor) -> None:
        """RuntimeError where the norm of the gradient is not the same on all ranks, but for rounding, or ``size`` is
        not, the norm of the parameters that they should have alike. All call it.
        """
        if not self.several:
            return
        found = torch.zeros(2, self.size, dtype=torch.float64, device=self._device)
        found[:, self.rank] = torch.stack([norm.to(found), size.to(found)])
        dist.all_reduce(found, group=self.group)
        norms, sizes_of_all = found.tolist()
        if not _close(sizes_of_all, 1e-9) and any(map(math.isfinite, sizes_of_all)):
            raise RuntimeError(
                f"parameters should be the same on all ranks, but their norms are {sizes_of_all}: an earlier step() "
                "came after a backward pass inside no_sync(), or with gradients that were not averaged; broadcast "
                "them from one rank, and load a checkpoint of that one's"
            )
        if not _close(norms, 1e-3) and any(map(math.isfinite, norms)):
            raise RuntimeError(
                f"gradients should be averaged over the ranks before step(), but their norms are {norms}: the latest "
                "backward pass was inside no_sync(), or nothing averages them with process_group="
            )

    def mean(self, tensors: Sequence[Tensor]) -> None:
        """Average tensors over the ranks, in place."""
        if not self.several:
            return
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for t in tensors:
            by_kind.setdefault((t.device, t.dtype), []).append(t)
        for mine in by_kind.values():
            for bucket in _buckets(mine):
                flat = torch.cat([t.reshape(-1) for t in bucket])
                dist.all_reduce(flat, group=self.group)
                pieces = flat.div_(self.size).split([t.numel() for t in bucket])
                torch._foreach_copy_(bucket, [piece.view(t.shape) for t, piece in zip(bucket, pieces, strict=True)])

    def sums(self, values: Sequence[float]) -> list[float]:
        """Σ over the ranks of each number."""
        if not self.several or not values:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64, device="cpu").to(self._device)
        dist.all_reduce(found, group=self.group)
        return found.tolist()

    def agreed(self, flags: Sequence[bool]) -> list[bool]:
        """Which of them hold on all ranks."""
        return [n == self.size for n in self.sums(flags)]

    def least(self, value: int) -> int:
        """The least of the ranks' numbers."""
        if not self.several:
            return value
        found = torch.tensor([value], dtype=torch.int64, device="cpu").to(self._device)
        dist.all_reduce(found, op=dist.ReduceOp.MIN, group=self.group)
        return int(found)

    def common(self, value: int) -> int:
        """The first rank's."""
        if not self.several:
            return value
        found = torch.tensor([value if self.rank == 0 else 0], dtype=torch.int64, device="cpu").to(self._device)
        dist.all_reduce(found, group=self.group)
        return int(found)

    @property
    def _device(self) -> torch.device:
        """Where numbers for the group have to be."""
        on_gpu = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def each(self, function: Callable[[], Found]) -> Found:
        """``function()`` of every rank, or an error on all of them where it fails on one, so that none waits in vain.

        EmptyBatch where that is all that failed.
        """
        if not self.several:
            return function()
        error: Exception | None = None
        try:
            found = function()
        except Exception as failure:
            error = failure
        try:
            empty, failed = self.sums([isinstance(error, EmptyBatch), error is not None])
        except Exception as lost:  # a pass that ranks take together met this: what failed first is what to know
            raise (error or lost) from (lost if error is not None else None)
        if error is not None and (failed == empty or not isinstance(error, EmptyBatch)):
            raise error
        if failed > empty:
            raise RuntimeError(f"{int(failed - empty)} of {self.size} ranks failed in a pass of FishLeg's: see theirs")
        if empty:
            raise EmptyBatch("another rank's curvature batch has no samples")
        return found

    def check_equal(self, facts: Mapping[str, Any]) -> None:
        """ValueError that names the first fact in which ranks differ. All have to call it."""
        if not self.several:
            return
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, dict(facts), group=self.group)
        for name in dict.fromkeys(name for theirs in everyone for name in theirs):
            value = everyone[0].get(name)
            for rank, others in enumerate(everyone):
                if not _same(others.get(name), value):
                    raise ValueError(
                        f"all ranks should have the same model and settings, but {name} is {value!r} on rank 0 and "
                        f"{others.get(name)!r} on rank {rank}"
                    )


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    room = 0
    for t in tensors:
        if t.numel() > room:
            buckets.append([])
            room = BUCKET
        buckets[-1].append(t)
        room -= t.numel()
    return buckets


def _close(values: Sequence[float], tolerance: float) -> bool:
    return all(abs(value - values[0]) <= tolerance * abs(values[0]) for value in values)


def _same(a: Any, b: Any) -> bool:
    """Equal, floats but for the rounding of sums taken by another number of threads or on another processor."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (a != a and b != b) or math.isclose(a, b, rel_tol=1e-9)
    return a == b
