"""Seeing the user's own passes and repeating them without a trace: inputs, taps, generators, loader, isolation."""
