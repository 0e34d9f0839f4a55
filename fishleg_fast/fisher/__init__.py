"""The Fisher matrix of a model: its products with vectors, its Kronecker factors, and λ that follows it."""
