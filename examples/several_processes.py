"""DistributedDataParallel, and fully_shard with --shard, on CPUs here; NCCL where there are GPUs.

    torchrun --nproc-per-node 2 -m examples.several_processes
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from examples.plain_loop import LENGTH, NextByte
from examples.text import windows
from fishleg_fast import CategoricalLikelihood, FishLeg


def main() -> None:
    """Train; rank 0 tells."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--shard", action="store_true", help="fully_shard in the place of DistributedDataParallel")
    args = parser.parse_args()
    on_gpus = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpus else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    net = NextByte().to(device)
    model: nn.Module = net
    if args.shard:
        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
        for layer in net.children():
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
    else:
        model = DistributedDataParallel(net)
    likelihood = CategoricalLikelihood(class_dim=-1)
    optimizer = FishLeg(model, likelihood=likelihood, lr=5e-2)  # a short toy run; elsewhere start at 2e-2
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    torch.manual_seed(1 + dist.get_rank())  # other samples on each rank
    text = windows(LENGTH + 1).to(device)
    for step in range(args.steps):
        batch = text[torch.randint(len(text), (16,))]
        optimizer.zero_grad()
        loss = likelihood.nll(batch[:, 1:], model(batch[:, :-1]))
        loss.backward()
        optimizer.step()
        schedule.step()
        if dist.get_rank() == 0 and step % 20 in (0, 19):
            print(f"step {step}: loss {loss.item():.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    if not torch.cuda.is_available():  # gloo's threads outlive Python, which may abort: leave without its end
        sys.stdout.flush()
        os._exit(0)
