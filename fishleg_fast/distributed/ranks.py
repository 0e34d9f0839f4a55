"""Several processes that train one model, by torch.distributed: what of λ they have to agree on, and how.

Each process (rank) sees its own part of a batch. Gradients come averaged, from DistributedDataParallel or the user.
Moments and Fisher products are averaged here, in one all-reduce each for all blocks; everything else follows from those
and is computed by every rank alike, so that parameters stay equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
        self.group, self._wrapper = group, wrapper
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    @staticmethod
    def of(model: nn.Module, group: dist.ProcessGroup | None) -> Ranks:
        """Those of ``group``; for None those that a DistributedDataParallel averages gradients over."""
        wrapper = next((m for m in _wrappers(model) if isinstance(m, _WRAPPER)), None)
        if group is None and wrapper is not None:
            group = wrapper.process_group
        return Ranks(group, wrapper)

    @property
    def several(self) -> bool:
        """Whether there is more than this process."""
        return self.size > 1

    def check_step(self) -> None:
        """RuntimeError where the gradients of this step are not the ranks' average, or some ranks take no step."""
        if not self.several or self._wrapper is None:
            return
        if not self._wrapper.require_backward_grad_sync:
            raise RuntimeError("step() should come after a backward pass outside of no_sync(), but gradients are local")
        if getattr(getattr(self._wrapper, "_join_config", None), "enable", False):
            raise RuntimeError(
                "join() is not supported: ranks that have run out of batches would take no part in averaging the "
                "curvature. Give every rank as many batches (DistributedSampler with drop_last=True)"
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
        empty, failed = self.sums([isinstance(error, EmptyBatch), error is not None])
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
        for name, value in everyone[0].items():
            for rank, others in enumerate(everyone):
                if others.get(name) != value:
                    raise ValueError(
                        f"all ranks should have the same model and settings, but {name} is {value!r} on rank 0 and "
                        f"{others.get(name)!r} on rank {rank}"
                    )


def _wrappers(model: nn.Module) -> list[nn.Module]:
    """The model, and what it wraps."""
    found = [model]
    while True:
        outer = found[-1]
        inner = outer.module if isinstance(outer, _WRAPPER) else dict(outer.named_children()).get("_orig_mod")
        if not isinstance(inner, nn.Module):
            return found
        found.append(inner)


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
