"""The θ step: its plan, its groups of rows, its launches."""
