"""What the kernels are told of blocks: rows, schedules of tiles, and the memory that their products need."""
