"""The tables and targets of OUT/gpu.json. Needs neither torch nor a GPU."""
