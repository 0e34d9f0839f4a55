"""What the benchmarks share: models, opponents, tables and plots."""
