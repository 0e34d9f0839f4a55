"""What is measured: correctness, the ops, and whole steps, beside their opponents."""
