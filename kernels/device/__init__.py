"""The Triton kernels and what they share; nothing here knows of blocks, or of torch."""
