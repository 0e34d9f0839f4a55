"""What the host does for the Triton kernels: what they are told of blocks, their launches, and the ops."""
