"""Bytes of the help texts that ship with Python: something to train on without a network."""

from __future__ import annotations

from pydoc_data import topics

import torch
from torch import Tensor

VOCABULARY = 128


def windows(length: int) -> Tensor:
    """All of the text, cut in windows of so many bytes: (windows, length)."""
    text = "".join(topics.topics[name] for name in sorted(topics.topics))
    tokens = torch.tensor(list(text.encode("ascii", errors="ignore")))
    return tokens[: len(tokens) // length * length].view(-1, length)
