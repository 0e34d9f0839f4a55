"""What steps cost on a CPU."""
