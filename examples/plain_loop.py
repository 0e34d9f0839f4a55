"""A plain torch loop: what changes beside AdamW are three lines.

    python -m examples.plain_loop
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from examples.text import VOCABULARY, windows
from fishleg_fast import CategoricalLikelihood, FishLeg

LENGTH = 32


class NextByte(nn.Module):
    """A convolution over the bytes before each byte, and two layers."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.before = nn.Conv1d(width, width, 8)
        self.hidden = nn.Linear(width, 2 * width)
        self.head = nn.Linear(2 * width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> logits of the byte after each (B, T, 128)."""
        x = nn.functional.pad(self.embedding(tokens).mT, (7, 0))
        return self.head(torch.relu(self.hidden(torch.relu(self.before(x)).mT)))


def train(steps: int, adamw: bool = False) -> float:
    """Train by FishLeg or AdamW; returns the mean loss of the last ten steps."""
    torch.manual_seed(0)
    net, text, losses = NextByte(), windows(LENGTH + 1), list[float]()
    likelihood = CategoricalLikelihood(class_dim=-1)
    if adamw:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.0)
    else:
        optimizer = FishLeg(net, likelihood=likelihood, lr=5e-2)  # a short toy run; elsewhere start at 2e-2
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = text[torch.randint(len(text), (32,))]
        optimizer.zero_grad()
        loss = likelihood.nll(batch[:, 1:], net(batch[:, :-1]))
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / len(losses[-10:])


def main() -> None:
    """Train by both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps
    for name, adamw in (("AdamW, lr 0.01", True), ("FishLeg, lr 0.05", False)):
        print(f"{name}: loss {train(steps, adamw):.3f} after {steps} steps")


if __name__ == "__main__":
    main()
