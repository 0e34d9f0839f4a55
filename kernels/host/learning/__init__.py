"""The λ step: its plan, its launches, and the op."""
