"""Where ops run: a registry of backends, the protocol that they have in common, and the backends themselves."""
