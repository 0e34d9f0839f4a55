"""Benchmarks and studies, run from the checkout's root: `python -m benchmarks.cpu.step_time`, or by make's targets."""
