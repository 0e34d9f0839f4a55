"""Blocks that several processes share out between them: the λ of each is on one."""
