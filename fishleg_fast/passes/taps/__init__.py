"""What sees the user's own passes."""
