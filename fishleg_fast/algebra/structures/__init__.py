"""Structured inverse Fisher matrices: what they share in ``base`` and ``kronecker``, then one file each."""
