"""Types of command line arguments."""

from __future__ import annotations

import argparse
import math


def positive(text: str) -> int:
    """A whole number above zero."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"should be 1 or more but is: {text}")
    return value


def rate(text: str) -> float:
    """A learning rate: finite and above zero."""
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"should be a number above 0 but is: {text}")
    return value


def comma_separated(text: str) -> list[str]:
    """Comma-separated names."""
    return text.split(",")


def integers(text: str) -> list[int]:
    """Comma-separated whole numbers."""
    return [int(x) for x in text.split(",")]
