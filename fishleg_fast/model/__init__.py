"""How a model becomes matrices: blocks, layers, the modules that carry λ, and their assembly."""
