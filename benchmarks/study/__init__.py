"""How fast the optimizers converge, in steps and in seconds."""
