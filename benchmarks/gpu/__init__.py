"""One command that checks and times everything on a GPU: `python -m benchmarks.gpu`."""
