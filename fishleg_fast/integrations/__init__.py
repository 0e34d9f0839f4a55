"""What other libraries ask of the optimizer."""
